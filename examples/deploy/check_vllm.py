"""Fail where the vLLM beside the plugin is not one that it supports, or does not take it: for the build of an image."""

from importlib.metadata import requires, version

from packaging.requirements import Requirement

from vllm_twotower.registration import raise_recorded_problem, register_with_vllm

supported = next(
    one for one in map(Requirement, requires("vllm-twotower") or ()) if one.name == "vllm" and "gpu" in str(one.marker)
)
if not supported.specifier.contains(version("vllm"), prereleases=True):
    raise SystemExit(f"vllm {version('vllm')} is installed, and vllm-twotower supports {supported.specifier}")
register_with_vllm()
raise_recorded_problem()
print(f"vllm-twotower {version('vllm-twotower')} registers with vllm {version('vllm')}")
