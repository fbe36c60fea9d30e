"""The peer: lm-evaluation-harness on the benchmark's questions. Started by mcq.py.

Prints a JSON line: the seconds that its model took to score, and its accuracies.
"""

import argparse
import json
import time
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text


class TimedLM(HFLM):
    """Measures the scoring time, without loading, reading and grading."""

    seconds = 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        began = time.monotonic()
        results = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds += time.monotonic() - began
        return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("task", help="JSON: the config of a task, or what differs from a known one")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = TimedLM(args.model, device="cpu", dtype="float32", batch_size=args.batch_size)
    task = json.loads(args.task)
    if task["task"] == "pubmedqa":  # its prompt is a function of the harness's
        task["doc_to_text"] = doc_to_text
    results = simple_evaluate(model, tasks=[task], bootstrap_iters=0, log_samples=False)
    assert results is not None
    (scores,) = results["results"].values()
    print(
        json.dumps(
            {
                "seconds": model.seconds,
                "accuracy": scores["acc,none"],
                "accuracy_normalised": scores.get("acc_norm,none"),
            }
        )
    )


if __name__ == "__main__":
    main()
