"""How many tokens a second do we generate, and how many do our peers, with the same memory on one machine?

    python benchmarks/generation/throughput.py --model opt-6.7b --sequences 96 --prompt 512 --new 32 \\
        --device-memory 16GiB --host-memory 110GiB \\
        --system capstan --system accelerate --peer-path /scratch/accelerate-site \\
        --system flexllmgen --flexllmgen-path /scratch/FlexLLMGen \\
        --flexllmgen-policy "--gpu-batch-size 24 --num-gpu-batches 4 --percent 20 80 0 100 100 0"

On a processor whose memory holds a part of the weights, the rest on disk:

    python benchmarks/generation/throughput.py --model llama-160m --dtype float32 --device cpu \\
        --device-memory 35% --host-memory 35% --peer-offload disk --sequences 8 --prompt 64 --new 8 \\
        --system capstan --system accelerate --peer-path /scratch/accelerate-site

Every run is whole: all prompts, all new tokens, nothing extrapolated. Weights are random, shapes and prompts
are the same for all; no answer ends early. On CUDA the cap holds for every system alike. On a processor each
is told its limit and its memory is measured; to enforce it for all, run this in a cgroup.
"""

import argparse
from dataclasses import replace

from side_by_side import Run, add_workload, job_from, machine, print_table, record_results, run_all
from workload import Job

SYSTEMS = ("capstan", "accelerate", "flexllmgen")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload(parser)
    add = parser.add_argument
    add("--system", action="append", choices=SYSTEMS, help="run it, in the order given; again and again")
    add("--lengths", default="fixed", help="of prompts: fixed, or uniform:32-512")
    add("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    add("--peer-python", default=None, help="the interpreter of the peers' environment")
    add("--peer-path", default="", help="put before the peers' PYTHONPATH")
    add("--peer-batch", type=int, action="append", default=[], help="accelerate: try these, in this order")
    add("--peer-offload", choices=["cpu", "disk"], default="cpu")
    add("--peer-cache", choices=["dynamic", "offloaded"], default="dynamic")
    add("--peer-dtype", choices=["float16", "bfloat16", "float32"], default=None)
    add("--keep-file-cache", action="store_true", help="let peers read streamed files from the page cache")
    add("--flexllmgen-path", default="", help="the folder with FlexLLMGen's package")
    add("--flexllmgen-policy", default="", help="FlexLLMGen's own flags")
    options = parser.parse_args()

    systems = options.system or ["capstan"]
    if "flexllmgen" in systems and not options.flexllmgen_path:
        print("flexllmgen is left out: --flexllmgen-path says where its source is.")
        systems = [system for system in systems if system != "flexllmgen"]
    probed = machine()
    job = job_from(
        options,
        written="accelerate" in systems,
        lengths=options.lengths,
        shared_prefix=options.shared_prefix,
        peer_batches=tuple(options.peer_batch),
        peer_offload=options.peer_offload,
        peer_cache=options.peer_cache,
        peer_dtype=options.peer_dtype,
        keep_file_cache=options.keep_file_cache,
        flexllmgen_path=options.flexllmgen_path,
        flexllmgen_policy=options.flexllmgen_policy,
    )
    labels = [f"{name} {systems[: index + 1].count(name)}" for index, name in enumerate(systems)]
    labels = [label.removesuffix(" 1") for label in labels]
    runs = [_run(label, name, job, options) for label, name in zip(labels, systems, strict=True)]
    results = run_all(runs, options.work)
    print_table(results)
    if options.record:
        record_results(
            options.record,
            claim=f"{job.model} generates within {options.device_memory} of the {job.device}, beside "
            + (", ".join(labels[1:]) or "nobody"),
            machine=probed,
            job=job,
            results=results,
            folder=options.folder_of_records,
        )


def _run(label: str, system: str, job: Job, options: argparse.Namespace) -> Run:
    run = Run(label=label, system=system, job=job)
    if system == "capstan":
        return run
    return replace(run, python=options.peer_python or run.python, path=options.peer_path)


if __name__ == "__main__":
    main()
