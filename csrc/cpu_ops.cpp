// The denoise pass's small operations in fp32 for a CPU, where plain torch spends more time between operations than in
// them. Semantics, letters and names: vllm_twotower/ops/<op>/reference.py; called through ctypes by
// vllm_twotower/cpu/ops/<op>.py, which sees to dtypes and layouts. No exceptions; outputs are contiguous and fully
// written.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define FOR_EVERY_CPU
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kUnmodulated = -1;
enum Part { kShift, kScale, kGate };

// exp to 2 ulp or so, branch-free so that it vectorises; 0 and infinity where std::exp gives them. NaN stays NaN.
inline float fast_exp(float x) {
    const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float k = std::nearbyint(clamped * 1.44269504088896341f);
    const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^k in two halves: k alone leaves the range of an exponent at both ends
    const int32_t whole = static_cast<int32_t>(k), half = whole / 2;
    const int32_t first_bits = (half + 127) << 23, second_bits = (whole - half + 127) << 23;
    float first, second;
    std::memcpy(&first, &first_bits, 4);
    std::memcpy(&second, &second_bits, 4);
    return p * first * second;
}

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// A block of kRows x kColumns sums at a time, which stays in registers.
constexpr int64_t kRows = 4, kLanes = 16, kColumns = 2 * kLanes;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline __attribute__((always_inline)) Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

// rows[i][0..depth) times matrix[depth][columns]; write(i, column, sums, count) gets count sums of neighbours.
template <class Write>
inline __attribute__((always_inline)) void products(const float* const* rows, int64_t count, const float* matrix,
                                                    int64_t depth, int64_t columns, Write write) {
    float sums[kRows][kColumns];
    for (int64_t first = 0; first < count; first += kRows) {
        const int64_t block = std::min(kRows, count - first);
        const float *row0 = rows[first], *row1 = rows[first + std::min<int64_t>(1, block - 1)];
        const float *row2 = rows[first + std::min<int64_t>(2, block - 1)], *row3 = rows[first + block - 1];
        int64_t column = 0;
        for (; column + kColumns <= columns; column += kColumns) {
            Lanes a0 = {}, a1 = {}, b0 = {}, b1 = {}, c0 = {}, c1 = {}, d0 = {}, d1 = {};
            for (int64_t k = 0; k < depth; ++k) {
                const Lanes m0 = load(matrix + k * columns + column), m1 = load(matrix + k * columns + column + kLanes);
                a0 += row0[k] * m0, a1 += row0[k] * m1;
                b0 += row1[k] * m0, b1 += row1[k] * m1;
                c0 += row2[k] * m0, c1 += row2[k] * m1;
                d0 += row3[k] * m0, d1 += row3[k] * m1;
            }
            const Lanes all[kRows][2] = {{a0, a1}, {b0, b1}, {c0, c1}, {d0, d1}};
            std::memcpy(sums, all, sizeof sums);
            for (int64_t i = 0; i < block; ++i) write(first + i, column, sums[i], kColumns);
        }
        const float* row[kRows] = {row0, row1, row2, row3};
        for (; column < columns; ++column)
            for (int64_t i = 0; i < block; ++i) {
                sums[0][0] = 0.0f;
                for (int64_t k = 0; k < depth; ++k) sums[0][0] += row[i][k] * matrix[k * columns + column];
                write(first + i, column, sums[0], 1);
            }
    }
}

// Calls work(begin, end) for parts of [0, count), at least `least` long, on torch's own OpenMP threads.
template <class Work>
void share_out(int64_t count, int64_t least, Work work) {
    const int64_t parts = std::min<int64_t>(omp_get_max_threads(), count / least);
    if (parts <= 1) return work(0, count);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) work(count * part / parts, count * (part + 1) / parts);
}

constexpr int64_t kLeastTokens = 32;  // of a part: below, waking a thread costs more than it does

}  // namespace

// To be raised with every change of a signature or a struct; vllm_twotower/cpu/library.py wants its own number here.
EXPORT int64_t interface_version() { return 3; }

// Legend: T tokens, D hidden, 3: shift, scale, gate.
struct Modulation {
    const float* vector_L3D;
    const float* table_3D;
    const int64_t* level_R;
    const int64_t* row_T;
};

FOR_EVERY_CPU static void norm_tokens(float* out_TD, const float* x_TD, const float* weight_D, float eps,
                                      bool norm_first, Modulation m, int64_t hidden, int64_t begin, int64_t end) {
    const std::vector<float> zeros(3 * hidden);
    for (int64_t t = begin; t < end; ++t) {
        const float* x = x_TD + t * hidden;
        float* out = out_TD + t * hidden;
        const int64_t level = m.level_R[m.row_T[t]];
        const bool neutral = level == kUnmodulated;
        const float* vector = neutral ? zeros.data() : m.vector_L3D + level * 3 * hidden;
        const float* own = neutral ? zeros.data() : m.table_3D;
        const float *shift = vector + kShift * hidden, *scale = vector + kScale * hidden;
        const float *own_shift = own + kShift * hidden, *own_scale = own + kScale * hidden;
        float squares = 0.0f;
        if (norm_first) {
            squares = dot(x, x, hidden);
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t d = 0; d < hidden; ++d) {
                out[d] = x[d] * (1.0f + (scale[d] + own_scale[d])) + (shift[d] + own_shift[d]);
                squares += out[d] * out[d];
            }
        }
        const float factor = 1.0f / std::sqrt(squares / static_cast<float>(hidden) + eps);
        if (norm_first) {
#pragma omp simd
            for (int64_t d = 0; d < hidden; ++d)
                out[d] = weight_D[d] * (x[d] * factor) * (1.0f + (scale[d] + own_scale[d])) + (shift[d] + own_shift[d]);
        } else {
#pragma omp simd
            for (int64_t d = 0; d < hidden; ++d) out[d] = weight_D[d] * (out[d] * factor);
        }
    }
}

EXPORT void adaln_norm(float* out_TD, const float* x_TD, const float* weight_D, float eps, int norm_first, Modulation m,
                       int64_t tokens, int64_t hidden) {
    share_out(tokens, 4 * kLeastTokens, [=](int64_t begin, int64_t end) {
        norm_tokens(out_TD, x_TD, weight_D, eps, norm_first, m, hidden, begin, end);
    });
}

FOR_EVERY_CPU static void gate_and_norm_tokens(float* out_TD, const float* x_TD, const float* gate_TD,
                                               const float* weight_D, float eps, int64_t x_row, int64_t gate_row,
                                               int64_t channels, int64_t groups, int64_t begin, int64_t end) {
    const int64_t width = channels / groups;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t first = 0; first < channels; first += width) {
            const float *x = x_TD + t * x_row + first, *gate = gate_TD + t * gate_row + first;
            const float* weight = weight_D + first;
            float *out = out_TD + t * channels + first, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < width; ++i) {
                out[i] = x[i] * silu(gate[i]);
                squares += out[i] * out[i];
            }
            const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) out[i] *= factor * weight[i];
        }
}

// Rows of x and gate lie x_row and gate_row floats apart.
EXPORT void gated_norm(float* out_TD, const float* x_TD, const float* gate_TD, const float* weight_D, float eps,
                       int64_t x_row, int64_t gate_row, int64_t tokens, int64_t channels, int64_t groups) {
    share_out(tokens, kLeastTokens, [=](int64_t begin, int64_t end) {
        gate_and_norm_tokens(out_TD, x_TD, gate_TD, weight_D, eps, x_row, gate_row, channels, groups, begin, end);
    });
}

EXPORT FOR_EVERY_CPU void adaln_gate_add(float* out_TD, const float* x_TD, const float* residual_TD, Modulation m,
                                         int64_t tokens, int64_t hidden) {
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t level = m.level_R[m.row_T[t]], at = t * hidden;
        const float* gate = m.vector_L3D + (std::max<int64_t>(level, 0) * 3 + kGate) * hidden;
        const float* own_gate = m.table_3D + kGate * hidden;
        if (level == kUnmodulated) {
#pragma omp simd
            for (int64_t d = 0; d < hidden; ++d) out_TD[at + d] = residual_TD[at + d] + x_TD[at + d];
        } else {
#pragma omp simd
            for (int64_t d = 0; d < hidden; ++d)
                out_TD[at + d] = residual_TD[at + d] + (gate[d] + own_gate[d]) * x_TD[at + d];
        }
    }
}

// Legend: R rows, S positions, C channels, K taps, Z cache slots; strides in elements, the last dimension of every tensor
// contiguous.
struct ConvInputs {
    const float* x;
    int64_t x_row, x_position;
    const float *weight_KC, *bias_C, *cache_ZKC;
    int64_t cache_slot, cache_tap;
    const int64_t* slot_R;
};

FOR_EVERY_CPU static void convolve_rows(float* out_RSC, const ConvInputs* conv, int64_t width, int64_t channels,
                                        int64_t taps, int64_t begin, int64_t end) {
    const auto [x_RSC, x_row, x_position, weight_KC, bias_C, cache_ZKC, cache_slot, cache_tap, slot_R] = *conv;
    for (int64_t r = begin; r < end; ++r) {
        const float* cache = cache_ZKC + slot_R[r] * cache_slot;
        for (int64_t w = 0; w < width; ++w) {
            float* out = out_RSC + (r * width + w) * channels;
            if (bias_C) {
                std::copy(bias_C, bias_C + channels, out);
            } else {
                std::fill(out, out + channels, 0.0f);
            }
            for (int64_t k = 0; k < taps; ++k) {
                const int64_t at = w + k - (taps - 1);  // before 0: what the context left behind
                const float* in = at < 0 ? cache + (at + taps - 1) * cache_tap : x_RSC + r * x_row + at * x_position;
                const float* weight = weight_KC + k * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) out[c] += weight[c] * in[c];
            }
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) out[c] = silu(out[c]);
        }
    }
}

EXPORT void seeded_conv(float* out_RSC, const ConvInputs* conv, int64_t rows, int64_t width, int64_t channels,
                        int64_t taps) {
    share_out(rows, std::max<int64_t>(1, 2 * kLeastTokens / width), [=](int64_t begin, int64_t end) {
        convolve_rows(out_RSC, conv, width, channels, taps, begin, end);
    });
}

// Legend: as above, and H heads, P head size, G groups, N state size; x, b, c of one row and position lie at multiples
// of their strides, each [H * P] or [G * N] contiguous.
struct ScanInputs {
    const float *x, *dt, *b, *c;
    int64_t x_row, x_position, dt_row, dt_position, b_row, b_position, c_row, c_position;
    const float *a_H, *skip_H, *dt_bias_H;
    const float* state_ZHPN;
    int64_t state_slot;
    const int64_t* slot_R;
};

// One product per row and head: position t weighs the state's columns by c_t, decayed, and the inputs s <= t by
// (c_t b_s) decay(t, s) dt_s, and its own by the skip weight besides.
FOR_EVERY_CPU static void scan_rows(float* out_RSHP, const ScanInputs* in, int64_t width, int64_t heads,
                                    int64_t head_dim, int64_t groups, int64_t state_size, int64_t begin, int64_t end) {
    const int64_t depth = state_size + width;
    std::vector<float> step(width), log_decay(width), scores(width * width), weights(width * depth);
    std::vector<float> values(depth * head_dim);
    std::vector<const float*> weight_rows(width);
    for (int64_t t = 0; t < width; ++t) weight_rows[t] = weights.data() + t * depth;
    for (int64_t r = begin; r < end; ++r) {
        const float *x = in->x + r * in->x_row, *dt = in->dt + r * in->dt_row;
        const float *b = in->b + r * in->b_row, *c = in->c + r * in->c_row;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t group = h / (heads / groups) * state_size;
            float total = 0.0f;
            for (int64_t w = 0; w < width; ++w) {
                const float raw = dt[w * in->dt_position + h] + in->dt_bias_H[h];
                step[w] = raw > 20.0f ? raw : std::log1p(std::exp(raw));  // torch's softplus
                log_decay[w] = total += step[w] * in->a_H[h];
            }
            if (h % (heads / groups) == 0)
                for (int64_t t = 0; t < width; ++t)
                    for (int64_t s = 0; s <= t; ++s)
                        scores[t * width + s] =
                            dot(c + t * in->c_position + group, b + s * in->b_position + group, state_size);
            for (int64_t t = 0; t < width; ++t) {
                float *carried = weights.data() + t * depth, *inside = carried + state_size;
                const float* c_t = c + t * in->c_position + group;
                const float decay = std::exp(log_decay[t]), now = log_decay[t];
#pragma omp simd
                for (int64_t n = 0; n < state_size; ++n) carried[n] = decay * c_t[n];
#pragma omp simd
                for (int64_t s = 0; s <= t; ++s)
                    inside[s] = scores[t * width + s] * fast_exp(now - log_decay[s]) * step[s];
                inside[t] += in->skip_H[h];
                std::fill(inside + t + 1, inside + width, 0.0f);
            }
            const float* state = in->state_ZHPN + in->slot_R[r] * in->state_slot + h * head_dim * state_size;
            for (int64_t n = 0; n < state_size; ++n)
                for (int64_t p = 0; p < head_dim; ++p) values[n * head_dim + p] = state[p * state_size + n];
            for (int64_t w = 0; w < width; ++w)
                std::copy_n(x + w * in->x_position + h * head_dim, head_dim, &values[(state_size + w) * head_dim]);
            const auto store = [&](int64_t t, int64_t column, const float* sums, int64_t n) {
                std::copy_n(sums, n, out_RSHP + ((r * width + t) * heads + h) * head_dim + column);
            };
            products(weight_rows.data(), width, values.data(), depth, head_dim, store);
        }
    }
}

EXPORT void seeded_scan(float* out_RSHP, const ScanInputs* in, int64_t rows, int64_t width, int64_t heads,
                        int64_t head_dim, int64_t groups, int64_t state_size) {
    share_out(rows, std::max<int64_t>(1, kLeastTokens / width), [=](int64_t begin, int64_t end) {
        scan_rows(out_RSHP, in, width, heads, head_dim, groups, state_size, begin, end);
    });
}

// Legend: E experts, I their width, k experts per token.
struct Router {
    const float *weight_ED, *bias_E;
    int64_t top_k;
    int normalise;
    double scaling;
};

FOR_EVERY_CPU static void mix_tokens(float* out_TD, const float* x_TD, const Router* router, const float* up_EDI,
                                     const float* down_EID, int64_t tokens, int64_t hidden, int64_t experts,
                                     int64_t width) {
    struct Use {
        int64_t token;
        float weight;
    };
    std::vector<std::vector<Use>> uses(experts);
    std::vector<double> score(experts), key(experts);
    std::vector<int64_t> order(experts);
    for (int64_t t = 0; t < tokens; ++t) {
        const float* x = x_TD + t * hidden;
        for (int64_t e = 0; e < experts; ++e) {
            const float* gate = router->weight_ED + e * hidden;
            double sum = 0.0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < hidden; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(gate[d]);
            score[e] = 1.0 / (1.0 + std::exp(-sum));
            order[e] = e;
        }
        for (int64_t e = 0; e < experts; ++e) {
            const double biased = score[e] + static_cast<double>(router->bias_E[e]);
            key[e] = std::isnan(biased) ? HUGE_VAL : biased;  // chosen, as by torch, and an order without holes
        }
        const auto better = [&](int64_t i, int64_t j) { return key[i] > key[j]; };
        std::partial_sort(order.begin(), order.begin() + router->top_k, order.end(), better);
        double total = 1e-20;
        for (int64_t i = 0; i < router->top_k; ++i) total += score[order[i]];
        for (int64_t i = 0; i < router->top_k; ++i) {
            const double share = router->normalise ? score[order[i]] / total : score[order[i]];
            uses[order[i]].push_back({t, static_cast<float>(share * router->scaling)});
        }
    }
    std::fill(out_TD, out_TD + tokens * hidden, 0.0f);
    int64_t most = 0;
    for (const auto& own : uses) most = std::max<int64_t>(most, own.size());
    std::vector<float> inner(most * width);
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t count = uses[e].size();
        const Use* use = uses[e].data();
        std::vector<const float*> rows(count);
        for (int64_t i = 0; i < count; ++i) rows[i] = x_TD + use[i].token * hidden;
        const auto square = [&](int64_t i, int64_t column, const float* sums, int64_t n) {
            float* to = inner.data() + i * width + column;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                const float positive = sums[j] < 0.0f ? 0.0f : sums[j];  // not std::max, which would turn NaN into 0
                to[j] = positive * positive;
            }
        };
        products(rows.data(), count, up_EDI + e * hidden * width, hidden, width, square);
        for (int64_t i = 0; i < count; ++i) rows[i] = inner.data() + i * width;
        const auto add = [&](int64_t i, int64_t column, const float* sums, int64_t n) {
            float* to = out_TD + use[i].token * hidden + column;
            const float weight = use[i].weight;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) to[j] += weight * sums[j];
        };
        products(rows.data(), count, down_EID + e * width * hidden, width, hidden, add);
    }
}

EXPORT void mixture_of_experts(float* out_TD, const float* x_TD, const Router* router, const float* up_EDI,
                               const float* down_EID, int64_t tokens, int64_t hidden, int64_t experts, int64_t width) {
    share_out(tokens, kLeastTokens, [=](int64_t begin, int64_t end) {
        mix_tokens(out_TD + begin * hidden, x_TD + begin * hidden, router, up_EDI, down_EID, end - begin, hidden,
                   experts, width);
    });
}

// Legend: N rows, V vocabulary. Greedy: the lowest token of the highest logit, and the log of the sum of exponentials,
// both without the mask id; a row of NaN or without a finite logit gives NaN.
FOR_EVERY_CPU static void sample_rows(int64_t* token_N, float* highest_N, float* log_total_N, const float* logits_NV,
                                      int64_t mask_token_id, int64_t vocab, int64_t begin, int64_t end) {
    std::vector<float> row(vocab);
    for (int64_t n = begin; n < end; ++n) {
        std::copy(logits_NV + n * vocab, logits_NV + (n + 1) * vocab, row.data());
        row[mask_token_id] = -HUGE_VALF;
        float highest = -HUGE_VALF, total = 0.0f;
#pragma omp simd reduction(max : highest)
        for (int64_t v = 0; v < vocab; ++v) highest = row[v] > highest ? row[v] : highest;
#pragma omp simd reduction(+ : total)
        for (int64_t v = 0; v < vocab; ++v) total += fast_exp(row[v] - highest);
        const auto found = std::find(row.begin(), row.end(), highest);
        token_N[n] = found == row.end() || std::isinf(highest) ? 0 : found - row.begin();
        highest_N[n] = highest;
        log_total_N[n] = highest + std::log(total);
    }
}

EXPORT void greedy_sample(int64_t* token_N, float* highest_N, float* log_total_N, const float* logits_NV,
                          int64_t mask_token_id, int64_t rows, int64_t vocab) {
    share_out(rows, std::max<int64_t>(1, 32768 / vocab), [=](int64_t begin, int64_t end) {
        sample_rows(token_N, highest_N, log_total_N, logits_NV, mask_token_id, vocab, begin, end);
    });
}

// Legend: R rows, S canvas positions. A canvas is 16 or 32 positions, so ranks come from comparing all pairs.
struct RevealInputs {
    const int64_t* token;     // [R, S]
    const int64_t* proposal;  // [R, S]
    const float* confidence;  // [R, S]
    const uint8_t* masked;    // [R, S]
    const int64_t* pass;      // [R]
    const int64_t* width;     // [R]
    const float* threshold;   // [R]
    const int64_t* max_steps; // [R]
};

EXPORT void reveal(int64_t* token_RS, uint8_t* masked_RS, int64_t* level_R, int64_t* pass_R, const RevealInputs* in,
                   int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* masked = in->masked + r * width;
        const float* confidence = in->confidence + r * width;
        int64_t num_masked = 0, num_sure = 0;
        for (int64_t i = 0; i < width; ++i) {
            num_masked += masked[i];
            num_sure += masked[i] && confidence[i] > in->threshold[r];
        }
        const int64_t passes_left = std::max<int64_t>(in->max_steps[r] - in->pass[r], 1);
        const int64_t wanted = std::max<int64_t>({num_sure, (num_masked + passes_left - 1) / passes_left, 1});
        // as in a torch sort a NaN is the surest
        const auto sureness = [=](int64_t i) { return std::isnan(confidence[i]) ? HUGE_VALF : confidence[i]; };
        int64_t num_left = 0;
        for (int64_t i = 0; i < width; ++i) {
            int64_t rank = 0;
            for (int64_t j = 0; j < width; ++j) {
                rank += masked[j] && (sureness(j) > sureness(i) || (sureness(j) == sureness(i) && j < i));
            }
            const bool revealed = masked[i] && rank < wanted;
            token_RS[r * width + i] = (revealed ? in->proposal : in->token)[r * width + i];
            masked_RS[r * width + i] = masked[i] && !revealed;
            num_left += masked[i] && !revealed;
        }
        level_R[r] = in->width[r] * (in->width[r] + 1) / 2 - 1 + num_left;  // decoding.noise_level.level_index
        pass_R[r] = in->pass[r] + (num_masked > 0);
    }
}
