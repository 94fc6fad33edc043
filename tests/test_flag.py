"""The ``--diffusion`` flag on vLLM's real parsers."""

import json
import pathlib
import pickle
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.frontend.startup_rules import SCHEDULER_CLASS


@pytest.fixture
def parse(tiny_mlp):
    load_general_plugins()  # as vLLM's command does before it builds any parser

    def run(*arguments, args_class=AsyncEngineArgs, model=tiny_mlp.path):
        parser = args_class.add_cli_args(FlexibleArgumentParser())
        common = ["--model", str(model), "--max-model-len", "512", "--skip-tokenizer-init"]
        return args_class.from_cli_args(parser.parse_args([*common, *arguments]))

    return run


@pytest.mark.parametrize("args_class", [EngineArgs, AsyncEngineArgs])
def test_alone_and_with_options(parse, args_class):
    assert parse("--diffusion", args_class=args_class).additional_config == {"diffusion": True}
    options = {"canvas_length": 8, "commit_quorum": 0.5}
    args = parse("--diffusion", json.dumps(options), args_class=args_class)
    assert args.additional_config == {"diffusion": options}
    assert args.create_engine_config().scheduler_config.scheduler_cls == SCHEDULER_CLASS
    assert parse(args_class=args_class).additional_config == {}


@pytest.mark.parametrize("flag_first", [True, False])
def test_any_order_with_additional_config(parse, flag_first):
    ours, theirs = ["--diffusion", '{"canvas_length": 8}'], ["--additional-config", '{"mine": 1}']
    args = parse(*(ours + theirs if flag_first else theirs + ours))
    assert args.additional_config == {"diffusion": {"canvas_length": 8}, "mine": 1}


def test_a_process_that_reads_the_same_arguments_without_plugins_sees_it(tiny_mlp):
    """As every API server of ``--api-server-count 2`` does, the default with ``--data-parallel-size 2``."""
    load_general_plugins()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(["--model", str(tiny_mlp.path), "--diffusion", '{"canvas_length": 8}'])
    AsyncEngineArgs.from_cli_args(namespace)
    without_plugins = AsyncEngineArgs.from_cli_args.__func__.__wrapped__
    sent = pickle.loads(pickle.dumps(namespace))
    assert without_plugins(AsyncEngineArgs, sent).additional_config == {"diffusion": {"canvas_length": 8}}


def test_two_different_answers_are_refused(parse):
    with pytest.raises(ValueError, match="keep one of them"):
        parse("--diffusion", "--additional-config", '{"diffusion": {"canvas_length": 8}}')


def test_it_is_not_an_abbreviation_and_upstreams_option_means_the_same(parse):
    args = parse("--diffusion-config", '{"canvas_length": 8}')
    assert args.additional_config == {}
    config = args.create_engine_config()
    assert config.additional_config == {"diffusion": {"canvas_length": 8}}
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLASS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"canvas": 8}', "unknown diffusion engine option 'canvas'"),
        ('{"canvas_length": 99}', "canvas_length=99 is not allowed: use an integer from 1 to 32"),
        ("some/model", "is not JSON.*after the model"),
        ("[]", "diffusion=\\[\\]"),
    ],
)
def test_a_wrong_value_is_one_readable_line(parse, capsys, value, message):
    import re

    with pytest.raises(SystemExit):
        parse("--diffusion", value)
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_on_another_model_it_is_an_error(parse, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs a two-tower model.*LlamaForCausalLM: leave out --diffusion"):
        parse("--diffusion", model=tmp_path).create_engine_config()
    assert parse(model=tmp_path).create_engine_config().model_config.architecture == "LlamaForCausalLM"


def run_benchmark(name, model, *arguments):
    """One of vLLM's own benchmarks, as a user types it."""
    command = [str(pathlib.Path(sys.executable).with_name("vllm")), "bench", name, "--diffusion", "--model", str(model)]
    command += ["--enforce-eager", "--max-model-len", "128", "--kv-cache-memory-bytes", str(64 << 20), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_vllms_throughput_benchmark_runs():
    sizes = ["--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16", "--num-prompts", "2"]
    assert "Throughput:" in run_benchmark("throughput", DEMO_MODEL, *sizes)


@pytest.mark.slow
def test_vllms_latency_benchmark_runs(tiny_mlp, tmp_path):
    """It draws token ids up to 10,000, so it needs a larger vocabulary than the demo model's."""
    (tmp_path / "config.json").write_text(json.dumps({**tiny_mlp.config, "vocab_size": 10_240}))
    sizes = [
        "--input-len",
        "8",
        "--output-len",
        "16",
        "--batch-size",
        "2",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "0",
    ]
    output = run_benchmark("latency", tmp_path, *sizes, "--load-format", "dummy", "--skip-tokenizer-init")
    assert "Avg latency:" in output
