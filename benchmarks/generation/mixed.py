"""What does it bring that nothing is padded, and that a shared prefix is kept once?

    python benchmarks/generation/mixed.py --question lengths --model opt-6.7b --sequences 96
    python benchmarks/generation/mixed.py --question prefix --model opt-6.7b --sequences 96 --prompt 512

`lengths`: prompts of 32 to 512 tokens as they are, against the same prompts padded to the longest.
`prefix`: prompts whose first 400 of 512 tokens are the same: with what the planner predicts to be faster,
never shared, always shared.
Ours against ours, one after the other, each in a process of its own.
"""

import argparse
from dataclasses import replace

from side_by_side import Run, add_workload, job_from, machine, print_table, record_results, run_all

CLAIMS = {
    "lengths": "prompts of mixed lengths are not padded, and that is faster",
    "prefix": "a prefix that prompts share is computed and kept once where that is faster",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload(parser)
    parser.add_argument("--question", choices=CLAIMS, required=True)
    parser.add_argument("--lengths", default="uniform:32-512", help="of prompts, for --question lengths")
    parser.add_argument("--shared-prefix", type=int, default=400, help="tokens, for --question prefix")
    options = parser.parse_args()
    probed = machine()
    if options.question == "lengths":
        job = job_from(options, written=False, lengths=options.lengths)
        variants = {"as they are": job, "padded": replace(job, padded=True)}
    else:
        job = job_from(options, written=False, shared_prefix=options.shared_prefix)
        variants = {
            "as planned": replace(job, share_prefixes=None),
            "not shared": replace(job, share_prefixes=False),
            "always shared": replace(job, share_prefixes=True),
        }
    runs = [Run(label=f"capstan, {name}", system="capstan", job=each) for name, each in variants.items()]
    results = run_all(runs, options.work)
    print_table(results)
    if options.record:
        record_results(
            options.record,
            claim=CLAIMS[options.question],
            machine=probed,
            job=runs[0].job,
            results=results,
            folder=options.folder_of_records,
        )


if __name__ == "__main__":
    main()
