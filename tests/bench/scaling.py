"""Fine-tuning speed with two workers beside one, on the same global batches.

`python -m tests.bench.scaling` prints the ratio, and that of plain matrix products on one and on
two cores, which the machine's caches, clock and memory set.
"""

from functools import partial

from tests.bench import common
from tests.bench.sft import medgpt


def main() -> None:
    args = common.options(__doc__, rounds=5).parse_args()
    found = common.alternate(
        {
            "1 worker": partial(medgpt, args, **{"cluster.num_workers": 1}),
            "2 workers": partial(medgpt, args),
        },
        rounds=args.rounds,
        results=args.results,
    )
    one, two = ([w.tokens_per_s for w in found[name]] for name in ("1 worker", "2 workers"))
    print(f"2 workers / 1 worker: {common.spread(common.ratios(two, one))}")
    products = [common.gemm_gflops(2) / common.gemm_gflops(1) for _ in range(args.rounds)]
    print(f"2 processes / 1 process, fp32 matrix products: {common.spread(products)}")


if __name__ == "__main__":
    main()
