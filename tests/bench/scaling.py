"""Fine-tuning speed with two workers beside one, on the same global batches.

`python -m tests.bench.scaling` prints the ratio, and two others that say what this machine allows:
that of a bare PyTorch loop on the same batches, and that of plain matrix products.
"""

from functools import partial

from tests.bench import common
from tests.bench.overhead import bare
from tests.bench.sft import medgpt


def main() -> None:
    args = common.options(__doc__, rounds=5).parse_args()
    contenders = common.alternate(
        {
            "1 worker": partial(medgpt, args, **{"cluster.num_workers": 1}),
            "2 workers": partial(medgpt, args),
            "bare loop, 1 process": partial(bare, args, ranks=1),
            "bare loop, 2 processes": partial(bare, args, ranks=2),
        },
        rounds=args.rounds,
        results=args.results,
    )
    one, two, bare_one, bare_two = (
        [w.tokens_per_s for w in windows] for windows in contenders.values()
    )
    print(f"2 workers / 1 worker: {common.spread(common.ratios(two, one))}")
    print(f"bare loop, 2 processes / 1: {common.spread(common.ratios(bare_two, bare_one))}")
    products = [common.gemm_gflops(2) / common.gemm_gflops(1) for _ in range(args.rounds)]
    print(f"fp32 matrix products, 2 processes / 1: {common.spread(products)}")


if __name__ == "__main__":
    main()
