#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Starts vLLM on real GPUs, once for each case, and writes down what it accounts for. Needs vLLM, and no weights.

    measure.py CASES.json RESULTS.jsonl [--gpus 4] [--seconds 500]

A case is {"id", "model" (a folder with config.json), "engine": {vLLM's arguments}, "utilization": 0.9, "peak": true,
"simulated_gpu_gib": 24 or null, "hold_bytes": memory that another process has, "loads": [...], "environment": {}}.
With simulated_gpu_gib the utilization is of a card of that size. Weights are dummies of the real shapes. Each case
starts with empty compile caches, unless "cache" names a folder to share. "peak" lists what is allocated when the
profile run needs most; a load is {"requests", "prompt", "output", "sampling": {SamplingParams' arguments}}: so many
requests at once, of so many tokens. {"id", "together": [cases]} starts several on the same GPUs at the same time.
Each case runs as soon as there are GPUs for it, in the order of the list.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

LOG = {
    "log_model_loading_gib": r"Model loading took ([\d.]+) GiB",
    "log_available_kv_gib": r"Available KV cache memory: ([\d.-]+) GiB",
    "log_kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "log_max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "log_cudagraph_gib": r"Graph capturing finished in \d+ secs, took ([-\d.]+) GiB",
    "log_torch_peak_gib": r"torch peak memory increase: ([\d.]+)\s?GiB",
    "log_non_torch_gib": r"non-torch forward increase memory: ([-\d.]+)\s?GiB",
    "log_total_consumed_gib": r"total consumed \(from mem_get_info\): ([-\d.]+)\s?GiB",
    "log_attention": r"Using (\S+) attention backend",
    "log_moe": r"Using '?(\w+)'? .*MoE backend",
}


def gpus_of(case: dict) -> int:
    if "together" in case:
        return max(map(gpus_of, case["together"]))
    return case["engine"].get("tensor_parallel_size", 1) * case["engine"].get("pipeline_parallel_size", 1)


def live_at_peak(events: list[dict], most: int = 14) -> list[dict]:
    """What a trace of torch's allocator says was live when it held most, largest first."""
    live: dict[int, dict] = {}
    held = highest = 0
    at_peak: list[dict] = []
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            held += event["size"]
            if held > highest:
                highest, at_peak = held, list(live.values())
        elif event["action"] == "free_completed" and event["addr"] in live:
            held -= live.pop(event["addr"])["size"]
    counted = Counter((event["size"], place(event)) for event in at_peak)
    rows = [{"bytes": size, "count": count, "at": at} for (size, at), count in counted.items()]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])[:most]


def place(event: dict) -> str:
    ours = [f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in event.get("frames", ())]
    return " < ".join(ours[:4])


def watch_profile_run(found: dict) -> None:
    """Record every allocation of the profile run. Works in the worker's own process only, that is for one GPU."""
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    inner = Worker.determine_available_memory

    def outer(self: Worker) -> int:
        run = self.model_runner.profile_run

        def recorded(*arguments, **options):
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=2_000_000)
            try:
                return run(*arguments, **options)
            finally:
                found["peak"] = live_at_peak(torch.cuda.memory._snapshot()["device_traces"][0])
                torch.cuda.memory._record_memory_history(enabled=None)

        self.model_runner.profile_run = recorded
        try:
            return inner(self)
        finally:
            self.model_runner.profile_run = run

    Worker.determine_available_memory = outer


def worker_report(worker) -> dict:
    import psutil
    import torch

    free, total = torch.cuda.mem_get_info()
    names = "requested_memory available_kv_cache_memory_bytes non_torch_memory total_consumed peak_activation_memory"
    report = {name: getattr(worker, name, None) for name in [*names.split(), "cudagraph_memory_estimate"]}
    runner = worker.model_runner
    return {
        **{name: None if value is None else int(value) for name, value in report.items()},
        "weights_bytes": int(runner.model_memory_usage),
        "runner": type(runner).__module__,
        "free_at_snapshot": int(worker.init_snapshot.free_memory),
        "total": int(total),
        "free": int(free),
        "rss": int(psutil.Process().memory_info().rss),
        "reserved": int(torch.cuda.memory_reserved()),
        "allocated": int(torch.cuda.memory_allocated()),
    }


def free_now(worker) -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def loaded(llm, longest: int, load: dict, seed: int) -> dict:
    """So many requests at once: seconds, tokens a second, and what is free then. No prompt is one of another seed's."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=load["output"], ignore_eos=True, detokenize=False, **(load.get("sampling") or {})
    )
    length = min(load["prompt"], longest - load["output"] - 1)
    draw = random.Random(seed)
    prompts = [{"prompt_token_ids": draw.choices(range(10, 30000), k=length)} for _ in range(load["requests"])]
    start = time.monotonic()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.monotonic() - start
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return {
        "seconds": round(seconds, 2),
        "output_tokens": tokens,
        "output_tokens_per_second": round(tokens / seconds, 1),
        "free_bytes": llm.collective_rpc(free_now),
    }


def one(case: dict) -> dict:
    import torch

    free, total = torch.cuda.mem_get_info()
    utilization = case.get("utilization", 0.9)
    if case.get("simulated_gpu_gib"):
        utilization *= case["simulated_gpu_gib"] * 2**30 / total
    held = torch.empty(case["hold_bytes"], dtype=torch.uint8, device="cuda") if case.get("hold_bytes") else None
    found: dict = {"id": case["id"], "gpu": torch.cuda.get_device_name(), "total": total, "free_before": free}
    one_gpu = gpus_of(case) == 1
    if one_gpu and case.get("peak"):
        watch_profile_run(found)
    import vllm
    from vllm import LLM

    start = time.monotonic()
    llm = LLM(
        model=case["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        gpu_memory_utilization=utilization,
        disable_log_stats=True,
        seed=0,
        **case["engine"],
    )
    found["start_seconds"] = round(time.monotonic() - start, 1)
    config = llm.llm_engine.vllm_config
    found.update(
        vllm_version=vllm.__version__,
        gpu_memory_utilization=utilization,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        cache_dtype=str(config.cache_config.cache_dtype),
        block_size=config.cache_config.block_size,
        num_gpu_blocks=config.cache_config.num_gpu_blocks,
        capture_sizes=len(config.compilation_config.cudagraph_capture_sizes or ()),
        cudagraph_mode=str(config.compilation_config.cudagraph_mode),
        held_bytes=held.numel() if held is not None else 0,
        ranks=llm.collective_rpc(worker_report),
    )
    if one_gpu:
        core = llm.llm_engine.engine_core.engine_core
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        found["kv_groups"] = [
            {
                "layers": len(group.layer_names),
                "spec": type(group.kv_cache_spec).__name__,
                "block_size": group.kv_cache_spec.block_size,
                "page_bytes": int(group.kv_cache_spec.page_size_bytes),
            }
            for group in groups
        ]
        found["parameters"] = sum(p.numel() for p in core.model_executor.driver_worker.worker.get_model().parameters())
    longest = found["max_model_len"]
    found["loads"] = [loaded(llm, longest, load, seed) for seed, load in enumerate(case.get("loads", ()))]
    return found


def run(case: dict, gpus: list[int], out: Path, lock: threading.Lock) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cache = case.get("cache") or folder
        description = Path(folder) / "case.json"
        description.write_text(json.dumps(case), encoding="utf-8")
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "VLLM_CACHE_ROOT": f"{cache}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if len(gpus) == 1 else "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **case.get("environment", {}),
        }
        command = [sys.executable, __file__, "--one", str(description)]
        log_path = out.parent / f"{case['id']}.log"
        with log_path.open("w", encoding="utf-8") as log:
            try:
                subprocess.run(command, check=False, env=environment, stdout=log, stderr=log, timeout=400)
            except subprocess.TimeoutExpired:
                print("TIMEOUT", file=log)
        text = log_path.read_text(encoding="utf-8", errors="replace")
    result: dict = {"id": case["id"], "case": case, "wall_seconds": round(time.monotonic() - start, 1)}
    for name, pattern in LOG.items():
        if values := re.findall(pattern, text):
            result[name] = values[-1]
    for line in text.splitlines():
        if line.startswith("MEASURED "):
            result["measured"] = json.loads(line[9:])
    if "measured" not in result:
        result["errors"] = [line[-300:] for line in text.splitlines() if re.search(r"Error|Exception", line)][-6:]
    with lock, out.open("a", encoding="utf-8") as results:
        results.write(json.dumps(result) + "\n")
        print(
            case["id"],
            result["wall_seconds"],
            result.get("log_available_kv_gib"),
            result.get("errors", [""])[-1][-200:],
        )
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first GPU to use")
    parser.add_argument("--seconds", type=float, default=500, help="start no case after so many")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = json.loads(options.cases.read_text(encoding="utf-8"))
    if options.one:
        print("MEASURED " + json.dumps(one(cases)), flush=True)
        return
    deadline = time.monotonic() + options.seconds
    lock, changed = threading.Lock(), threading.Condition()
    free = [options.first + gpu for gpu in range(options.gpus)]

    def work(case: dict, gpus: list[int]) -> None:
        parts = [
            threading.Thread(target=run, args=(part, gpus, options.out, lock)) for part in case.get("together", [case])
        ]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        with changed:
            free.extend(gpus)
            changed.notify()

    working = []
    for case in cases:
        width = gpus_of(case)
        if width > options.gpus:
            parser.error(f"{case['id']} needs {width} GPUs, and --gpus is {options.gpus}")
        with changed:
            changed.wait_for(lambda width=width: len(free) >= width)
            taken = sorted(free)[:width]
            free[:] = [gpu for gpu in free if gpu not in taken]
        if time.monotonic() > deadline:
            print(case["id"], "not started: --seconds are over")
            break
        working.append(threading.Thread(target=work, args=(case, taken)))
        working[-1].start()
    for thread in working:
        thread.join()


if __name__ == "__main__":
    main()
