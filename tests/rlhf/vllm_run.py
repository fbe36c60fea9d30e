"""Generate with vLLM before and after it receives new weights. Started by test_vllm.py in an
environment with vLLM.

Reads a JSON request from its arguments and prints the answer as JSON in its last line.
"""

import json
import sys
from dataclasses import asdict

import torch
from safetensors.torch import load_file

from medgpt.config.ppo import RolloutConfig
from medgpt.rlhf.vllm_engine import VllmEngine


def main() -> None:
    request = json.loads(sys.argv[1])
    prompts, ends = request["prompts"], request["ends"]
    seeds = list(range(len(prompts)))
    engine = VllmEngine(
        request["folder"], dtype=torch.float32, config=RolloutConfig(gpu_memory_share=0.3)
    )

    def generate(rows: list[int], temperature: float) -> list[dict[str, object]]:
        generated = engine.generate(
            [prompts[i] for i in rows],
            [seeds[i] for i in rows],
            max_new_tokens=12,
            temperature=temperature,
            stop_token_ids=ends,
        )
        return [asdict(row) for row in generated]

    answer = {"first": generate(seeds, 0.0)}
    weights = list(load_file(f"{request['other']}/model.safetensors").items())
    for bucket in (weights[:3], weights[3:]):
        engine.load_weights(bucket)
    engine.weights_loaded()
    answer["second"] = generate(seeds, 0.0)
    answer["sampled"] = generate(seeds, 0.7)
    answer["alone"] = generate(seeds[1:2], 0.7)
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
