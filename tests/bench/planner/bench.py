#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Prints how well the planner foretells real starts of vLLM, beside other estimators, and how its time grows.

bench.py [--table accuracy|tokens|speed|growth]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "collections"))

from ansible_collections.llmfleet.serving.plugins.module_utils._planner import (  # noqa: E402
    kv_cache,
    pack,
    search,
    support,
    wish,
)

GIB, MIB = 1 << 30, 1 << 20
DATA = json.loads(Path(__file__).with_name("starts.json").read_text())
STARTS: list[dict[str, Any]] = DATA["starts"]
LEFT_OUT = {
    "q25-7b-24g-16k-128-warm-compile-cache": "compile cache was warm; plans are for cold starts",
    "q25-3b-gptq-8k-eager": "vLLM did not apply the quantisation: it loaded the plain model's 5.79 GiB",
}
Estimator = Callable[[Mapping[str, Any], int], float]


def parallel(start: Mapping[str, Any]) -> int:
    return start["flags"].get("tensor_parallel_size", 1) * start["flags"].get("pipeline_parallel_size", 1)


def predict(start: Mapping[str, Any]) -> search.Try:
    """What the planner says of a start with exactly these flags on an empty card."""
    model = {"config": DATA["models"][start["model"]], "source": start["model"], "files": []}
    flags = {**start["flags"], "gpu_memory_utilization": start["gpu_memory_utilization"]}
    asked = wish.wish({"name": "bench", "model": model, "flags": flags})
    major, minor = map(int, start["compute_capability"].split("."))
    total, count = start["total_bytes"], parallel(start)
    cards = [
        wish.Gpu(at, f"GPU-{at}", start["gpu"], total, total, (major, minor), frozenset(range(count)))
        for at in range(count)
    ]
    split = search.Split(flags.get("tensor_parallel_size", 1), flags.get("pipeline_parallel_size", 1))
    batch = search.Batch(flags["max_num_batched_tokens"], flags["max_num_seqs"], flags.get("enforce_eager", False))
    task = search.Task(search.parse_model(model), asked, support.version(start["engine_version"]))
    return search.attempt(task, split, cards, batch)


def measured_cache(start: Mapping[str, Any]) -> int:
    """Bytes for the KV cache that vLLM accounted; to 0.01 GiB where its log alone was kept; 0 where it refused."""
    measured = start["measured"]
    return measured.get("kv_cache_bytes") or round(measured.get("log_kv_cache_gib", 0) * GIB)


def card_bytes(start: Mapping[str, Any]) -> float:
    return start["card_gib"] * GIB if start["card_gib"] else start["total_bytes"]


def error(start: Mapping[str, Any], predicted: float) -> float:
    """In % of the card's memory; above 0 more was promised than there was."""
    return (predicted - measured_cache(start)) / card_bytes(start) * 100


def weights_bytes(start: Mapping[str, Any]) -> int:
    """Of one GPU, as vLLM measured them; where it did not, as the planner has them."""
    measured = start["measured"]
    known = measured.get("weights_bytes") or round(measured.get("log_weights_gib", 0) * GIB)
    return known or predict(start).ranks[0].weights_bytes


def requested(start: Mapping[str, Any]) -> float:
    return start["total_bytes"] * start["gpu_memory_utilization"]


# -- the other estimators: each says what it leaves for the KV cache of one GPU ---------------------------------------


def hf_mem() -> Estimator:
    from hf_mem.safetensors.metadata import parse_safetensors_metadata  # noqa: PLC0415

    def left(start: Mapping[str, Any], weights: int) -> float:
        header = {"Transformer": {"weights": {"dtype": "U8", "shape": [weights], "data_offsets": [0, weights]}}}
        return requested(start) - parse_safetensors_metadata(header).bytes_count

    return left


def accelerate() -> Estimator:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from accelerate import init_empty_weights  # noqa: PLC0415
    from accelerate.utils import calculate_maximum_sizes  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    # As `accelerate estimate-memory` divides the float32 size by --dtypes.
    parts = {None: 2, "fp8": 4, "modelopt": 4, "compressed-tensors": 4, "awq": 8, "gptq": 8, "mxfp4": 8}
    sizes: dict[str, float] = {}

    def left(start: Mapping[str, Any], _weights: int) -> float:
        name = start["model"]
        if name not in sizes:
            figures = dict(DATA["models"][name])
            method = (figures.pop("quantization_config", None) or {}).get("quant_method")
            config = getattr(transformers, figures["architectures"][0]).config_class(**figures)
            with init_empty_weights(include_buffers=True):
                model = transformers.AutoModel.from_config(config, dtype=torch.float32)
            sizes[name] = calculate_maximum_sizes(model)[0] / parts[method]
        return requested(start) - sizes[name] / parallel(start)

    return left


def gpustack() -> Estimator:
    from gpustack.policies import utils  # noqa: PLC0415
    from gpustack.schemas.models import Model, SourceEnum  # noqa: PLC0415

    def left(start: Mapping[str, Any], weights: int) -> float:
        utils.get_model_weight_size = lambda _model, _token=None: weights * parallel(start)
        model = Model(
            name="bench", source=SourceEnum.HUGGING_FACE, huggingface_repo_id=start["model"], categories=["llm"]
        )
        return requested(start) - asyncio.run(utils.estimate_model_vram(model)) / parallel(start)

    return left


def llm_d_planner() -> Estimator:
    from planner import capacity_planner  # noqa: PLC0415

    def left(start: Mapping[str, Any], weights: int) -> float:
        figures = dict(DATA["models"][start["model"]])
        if "text_config" in figures:
            figures["text_config"] = SimpleNamespace(**figures["text_config"])
        ways, flags = parallel(start), start["flags"]
        capacity_planner.model_memory_req = lambda *_: weights * ways / GIB
        whole = capacity_planner.allocatable_kv_cache_memory(
            start["model"],
            SimpleNamespace(**figures),
            start["total_bytes"] / GIB,
            start["gpu_memory_utilization"],
            tp=flags.get("tensor_parallel_size", 1),
            pp=flags.get("pipeline_parallel_size", 1),
            max_model_len=flags["max_model_len"],
            batch_size=flags["max_num_seqs"],
        )
        return whole * GIB / ways

    return left


OTHERS = {"hf-mem": hf_mem, "accelerate": accelerate, "gpustack": gpustack, "llm-d-planner": llm_d_planner}
FOOTNOTES = """\
error: what is promised for the KV cache of one GPU minus what vLLM measured, in % of the card's memory ("card": a
smaller one is simulated by gpu_memory_utilization). Above 0 is an over-promise. * held out: measured after the
planner's constants had been set. ~ logged to 0.01 GiB. All are asked what gpu_memory_utilization leaves of the card.
  planner        the config's figures and the flags alone
  hf-mem         weights only; its parse_safetensors_metadata on a header of as many bytes as vLLM measured
  accelerate     weights only; its calculate_maximum_sizes on transformers' AutoModel (which has no output layer), as
                 estimate-memory does, by dtype: float16, int8 for 8 bits and int4 for 4 bits
  gpustack       its estimate_model_vram (weights * 1.2 + 2 GiB), with the measured weights of all GPUs, by their number
  llm-d-planner  its allocatable_kv_cache_memory, with the measured weights, by the number of GPUs
Where a start did not log its weights, the planner's figure for them is handed over (the four without `weights_bytes`
and `log_weights_gib`)."""


def quiet(make: Callable[[], Estimator]) -> Estimator | None:
    """The estimator, or None where it is not installed. They print and warn while they are imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return make()
        except ImportError:
            return None


# -- the tables -------------------------------------------------------------------------------------------------------


def accuracy() -> Iterator[str]:
    others = {name: made for name, make in OTHERS.items() if (made := quiet(make))}
    yield "planner " + ", ".join(f"{name} {metadata.version(name)}" for name in others)
    yield ""
    names = ["planner", *others]
    columns = "".join(f"{name:>14}" for name in names)
    yield "Card and KV cache (measured, planned) in GiB; of each estimator the error in % of the card's memory."
    yield f"{'start':<39}{'vLLM':>7}{'card':>7}{'measured':>11}{'planned':>9}  {columns}"
    errors: list[tuple[Mapping[str, Any], dict[str, float]]] = []
    refused: dict[str, bool] = {}
    for start in STARTS:
        planned = min(predict(start).available)
        weights = weights_bytes(start)
        left = {"planner": float(planned), **{name: estimate(start, weights) for name, estimate in others.items()}}
        card = f"{start['card_gib'] or start['total_bytes'] / GIB:.1f}"
        about = f"{mark(start):<39}{start['engine_version']:>7}{card:>7}"
        if start.get("refused"):
            refused = {name: bytes_left <= 0 for name, bytes_left in left.items()}
            said = "".join(f"{'right' if right else 'WRONG':>14}" for right in refused.values())
            yield f"{about}{'refused':>11}{'none':>9}  {said}"
            continue
        about += f"{measured_cache(start) / GIB:>10.2f}{'~' if logged_only(start) else ' '}{planned / GIB:>9.2f}  "
        if start["id"] in LEFT_OUT:
            yield f"{about}   left out: {LEFT_OUT[start['id']]}"
            continue
        wrong = {name: error(start, amount) for name, amount in left.items()}
        errors.append((start, wrong))
        yield about + "".join(f"{wrong[name]:>+14.2f}" for name in names)
    yield ""
    groups: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "0.25.1": lambda start: start["engine_version"] == "0.25.1",
        "0.32.0": lambda start: start["engine_version"] == "0.32.0",
        "held out": lambda start: start.get("held_out", False),
        "all": lambda start: True,
    }
    yield f"{'summary, % of the card':<39}{'':>36}{columns}"
    for group, belongs in groups.items():
        chosen = [wrong for start, wrong in errors if belongs(start)]
        for title, reduce in SUMMARY.items():
            told = "".join(f"{reduce([wrong[name] for wrong in chosen]):>14.2f}" for name in names)
            yield f"{f'{group} ({len(chosen)} starts): {title}':<75}{told}"
    yield ""
    yield FOOTNOTES


SUMMARY: dict[str, Callable[[Sequence[float]], float]] = {
    "median |error|": lambda wrong: statistics.median(map(abs, wrong)),
    "worst |error|": lambda wrong: max(map(abs, wrong)),
    "worst over-promise": lambda wrong: max(0.0, *wrong),
}


def mark(start: Mapping[str, Any]) -> str:
    return start["id"] + "*" * start.get("held_out", False)


def logged_only(start: Mapping[str, Any]) -> bool:
    return "kv_cache_bytes" not in start["measured"]


def tokens_of(start: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens and blocks that the planner's layout makes of the bytes that vLLM measured."""
    found, available = predict(start), measured_cache(start)
    tokens = kv_cache.tokens(found.layouts, available, found.max_model_len)
    return tokens, kv_cache.num_blocks(found.layouts, available)


def tokens() -> Iterator[str]:
    titles = (("logged tokens", 15), ("planned", 11), ("error %", 9), ("logged blocks", 15), ("planned", 9))
    yield f"{'start':<39}{'vLLM':>7}" + "".join(f"{title:>{width}}" for title, width in titles)
    worst, count, blocks = 0.0, 0, [0, 0]
    for start in STARTS:
        logged, pool = start["measured"].get("kv_cache_tokens"), start["measured"].get("num_gpu_blocks")
        if not measured_cache(start) or not (logged or pool):
            continue
        planned, planned_blocks = tokens_of(start)
        line = f"{mark(start):<39}{start['engine_version']:>7}"
        if logged:
            wrong = (planned - logged) / logged * 100
            worst, count = max(worst, abs(wrong)), count + 1
            line += f"{logged:>15}{planned:>11}{wrong:>+9.3f}"
        else:
            line += f"{'-':>15}{planned:>11}{'-':>9}"
        if pool:
            blocks = [blocks[0] + (pool == planned_blocks), blocks[1] + 1]
            line += f"{pool:>15}{planned_blocks:>9}"
        yield line + ("  ~" if logged_only(start) else "")
    yield ""
    yield f"worst of {count}: {worst:.3f} %; blocks are equal in {blocks[0]} of {blocks[1]} starts that logged them"
    yield "The planner's layout is handed the bytes that vLLM had. ~ these were logged to 0.01 GiB."


def speed() -> Iterator[str]:
    kinds = ("plan", "guide", "default")
    groups: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for start in STARTS:
        if "flags_of" in start:
            groups.setdefault((start["model"], start["card_gib"]), {})[start["flags_of"]] = start
    columns = "".join(f"{kind:>10}" for kind in kinds)
    yield f"{'':<37}{'output tokens/s':>30}{'tokens of KV cache':>30}"
    yield f"{'model':<31}{'card':>6}{columns}{columns}{'plan/best':>11}{'spread %':>10}"
    for (model, gib_of_card), starts in groups.items():
        rates = {kind: [load["output_tokens_per_second"] for load in starts[kind]["loads"][2:]] for kind in kinds}
        middle = {kind: statistics.mean(rates[kind]) for kind in kinds}
        spread = max((max(each) - min(each)) / min(each) * 100 for each in rates.values())
        told = "".join(f"{middle[kind]:>10.0f}" for kind in kinds)
        told += "".join(f"{starts[kind]['measured']['kv_cache_tokens']:>10}" for kind in kinds)
        best = max(middle["guide"], middle["default"])
        yield f"{model.rpartition('/')[2]:<31}{gib_of_card:>6.1f}{told}{middle['plan'] / best:>11.3f}{spread:>10.1f}"
    yield ""
    yield 'The last two of three loads of as many requests at once as "loads" says, 768 tokens and 256 of answer; the'
    yield "first compiles kernels. guide: utilization 0.95, 256 sequences; default: 0.92, 256 (1024 from 70 GiB on);"
    yield "all with 8192 tokens of context. spread: between the two loads, at most. Cards are simulated on an H200."


def fleet_host(number: int) -> list[dict[str, Any]]:
    """Plans of one host with four cards and three models, from the documents that Ansible hands on."""
    devices = [
        {
            "index": at,
            "uuid": f"GPU-{number}-{at}",
            "name": "NVIDIA H100 80GB HBM3",
            "vendor": "nvidia",
            "memory_total_bytes": 85_017_493_504,
            "memory_free_bytes": 85_017_493_504 - (number % 7 + 1) * 16 * MIB,
            "compute_capability": "9.0",
            "nvlink": [other for other in range(4) if other != at],
            "processes": [],
        }
        for at in range(4)
    ]
    asked = [
        {
            "name": name.rpartition("/")[2],
            "model": {"config": json.loads(json.dumps(DATA["models"][name])), "source": name, "files": []},
            "users": users,
            "context": context,
        }
        for name, users, context in (
            ("mistralai/Mixtral-8x7B-v0.1", 32, 8192),
            ("Qwen/Qwen2.5-7B-Instruct", 64, 8192),
            ("Qwen/Qwen3-30B-A3B-FP8", 16, 16384),
        )
    ]
    wishes = [wish.wish(document) for document in asked]
    return pack.pack(wishes, wish.gpus(devices), support.version("0.32.0"))


def growth() -> Iterator[str]:
    yield f"{'hosts':>6}{'models':>8}{'plans':>7}{'CPU s':>9}{'ms a host':>11}{'to 1 host':>11}"
    first = 0.0
    for hosts in (1, 10, 30, 100):
        began = time.process_time()
        answers = [answer for number in range(hosts) for answer in fleet_host(number)]
        took = time.process_time() - began
        first = first or took
        plans = sum("plan" in answer for answer in answers)
        ratio = took / hosts / first
        yield f"{hosts:>6}{len(answers):>8}{plans:>7}{took:>9.3f}{took / hosts * 1000:>11.1f}{ratio:>11.2f}"
    yield ""
    yield "Four H100 a host; Mixtral-8x7B for 32 users of 8k, Qwen2.5-7B for 64 of 8k, Qwen3-30B-A3B-FP8 for 16 of 16k,"
    yield "for vLLM 0.32.0; configs and devices are parsed anew for each host. CPU of one process, without Ansible's."


TABLES = {"accuracy": accuracy, "tokens": tokens, "speed": speed, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", choices=TABLES, action="append", help="only this one")
    chosen = parser.parse_args().table or list(TABLES)
    for name in chosen:
        print(f"== {name}\n")
        for line in TABLES[name]():
            print(line.rstrip(), flush=True)
        print()


if __name__ == "__main__":
    main()
