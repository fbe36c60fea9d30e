"""The cells of the matrix that use an exported model: reward, PPO, evaluation, chat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from medgpt.config.evaluation import EvalPoolConfig
from medgpt.config.loading import validate
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.data.sources.records import Conversation, Message, Preferences
from medgpt.engine import Engine
from medgpt.eval.engine import EvalEngine
from medgpt.eval.requests import Generate, Loglikelihood, RollingLoglikelihood
from medgpt.models.prompts import encode_prompt_options, encode_text
from medgpt.models.tokenizer_compat import tokenizer_fingerprint
from medgpt.models.value_model import RewardModelInfo, last_token_values, load_value_model
from medgpt.rlhf.experience import RunningStats
from medgpt.rlhf.preflight import check_models
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import UpdateTask
from medgpt.rlhf.roles.critic import Critic
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Logprobs, Prompts, Ragged
from medgpt.stages.chat import run_chat
from medgpt.train.reward_objective import RewardObjective
from tests.models import cells
from tests.models.cells import ANSWERS, CPU, QUESTIONS
from tests.models.families import Family
from tests.rlhf.cases import scores

MAX_GAP = 1e-3  # nats between the log-probabilities of rollout engine, training and transformers


def reward(family: Family, base: Path, folder: Path, *, rank: int = 0) -> None:
    """Train a value head on pairs of answers; transformers' classifier gives the same scores."""
    lora = {"lora": {"rank": rank}} if rank else {}
    config = validate(RewardModelConfig, cells.settings(base, folder / "run", family, **lora))
    rows, tokenizer = cells.encode(config, [preferences(i) for i in range(2)])
    rows = rows[1:]  # a row is a prompt with its answers
    objective = RewardObjective(config, tokenizer, CPU)
    engine = Engine(
        objective.module,
        engine=config.engine,
        optimizer=config.optimizer,
        total_steps=5,
        device=CPU,
    )
    batch = objective.collate(rows, epoch=0)
    for _ in range(5):
        loss, _ = objective.loss(engine, batch, num_targets=2)
        engine.backward(loss)
        engine.step()
    objective.module.eval()
    objective.reward_model_info = RewardModelInfo(
        mean=0.5, std=2.0, normalised_on="chosen", speech=tokenizer_fingerprint(tokenizer)
    )
    objective.export(engine, folder / "model")
    out = folder / "model"
    if rank:
        cells.merge_adapter(str(out), folder / "merged", family.remote_code)
    scorer, _ = load_value_model(str(out))
    with torch.no_grad():
        trained = last_token_values(objective.module(batch.packed), batch.packed)
        loaded = last_token_values(scorer(batch.packed), batch.packed)
        plain = AutoModelForSequenceClassification.from_pretrained(
            folder / "merged" if rank else out, num_labels=1, trust_remote_code=family.remote_code
        ).eval()
        plain.config.pad_token_id = None  # without padding, the last token is the last
        alone = [plain(input_ids=ids).logits[0, 0] for ids, _ in cells.pieces(batch.packed)]
    torch.testing.assert_close(trained, torch.stack(alone).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded, (trained - 0.5) / 2.0, atol=1e-4, rtol=1e-4)


def preferences(row: int) -> Preferences:
    answers = tuple((Message("assistant", answer),) for answer in ANSWERS)
    prompt = (Message("user", QUESTIONS[row]),)
    return Preferences(
        source="s", file="f", row=row, prompt=prompt, answers=answers, grades=(1.0, 0.0)
    )


def ppo(family: Family, policy: Path, folder: Path, *, rank: int = 0) -> None:
    """Sample, score, update once, send the weights: all parts agree about log-probabilities."""
    given = cells.settings(
        policy, folder / "run", family, **({"lora": {"rank": rank}} if rank else {})
    )
    fp32 = {"engine": {"zero_stage": 0}}
    config = validate(
        PPOStageConfig,
        {name: given[name] for name in ("run", "model", "data", "optimizer")}
        | {
            "ppo": {"rollout_batch_size": 2, "global_batch_size": 2, "micro_batch_tokens": 512},
            "reward": {"score_weight": 0.0},
            "rollout": {"max_new_tokens": 12},
            "pools": {"actor": fp32, "critic": fp32},
        },
    )
    with cells.before_data():
        check_models(config)
    rows, _ = cells.encode(config, [question(i) for i in range(2)])
    prompts = Prompts(
        sample_ids=["a", "b"],
        ids=Ragged.from_rows([row.input_ids for row in rows[1:]], np.int32),
        messages=[row.messages or "" for row in rows[1:]],
    )
    actor, rollout = Actor(config, total_iterations=1), Rollout(config)
    critic = Critic(config, total_iterations=1)
    rollout.load_weights(list(actor.weights()))
    rollout.weights_loaded(0)
    for iteration in range(2):
        sampled = rollout.generate(prompts, iteration)
        old = actor.logprobs(sampled)
        assert np.abs(old.values - sampled.logprobs).max() < MAX_GAP, "rollout and training"
        if iteration == 0:
            check_alone(family, policy, sampled)
            values = [critic.values(sampled)]
            reference = Logprobs(index=old.index, values=old.values, entropy=0.0)
            given_scores = [scores(sampled, [1.0, -1.0])]
            task = UpdateTask(
                iteration=0,
                weight_version=0,
                kl_coef=0.0,
                score_stats=RunningStats(),
                update_actor=True,
            )
            update = [sampled], given_scores, values, [old], [reference]
            actor.update(task, *update, None)
            critic.update(task, *update)
            assert np.abs(actor.logprobs(sampled).values - old.values).max() > 1e-3, "no update"
            rollout.load_weights(list(actor.weights()))
            rollout.weights_loaded(1)


def question(row: int) -> Conversation:
    return Conversation(source="s", file="f", row=row, messages=(Message("user", QUESTIONS[row]),))


@torch.no_grad()
def check_alone(family: Family, policy: Path, sampled: Any) -> None:
    """Check the log-probabilities of sampling against transformers' forward on each row alone."""
    model = cells.plain_model(family, policy)
    for row in range(2):
        prompt, response = sampled.prompts.row(row), sampled.responses.row(row)
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        alone = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        found = sampled.logprobs[sampled.responses.positions([row])]
        assert np.abs(alone - found).max() < MAX_GAP, "rollout and transformers"


def evaluation(family: Family, folder: Path) -> None:
    """Scores of options and texts in a batch are those of each row alone; replies are learned."""
    remote, pool = family.remote_code, EvalPoolConfig()
    with cells.before_data():
        engine = EvalEngine(str(folder), precision="fp32", pool=pool, trust_remote_code=remote)
    tokenizer, model = engine.tokenizer, cells.plain_model(family, folder)
    prompts = [(Message("user", question),) for question in QUESTIONS]
    found: dict[str, Any] = {
        response.id: response
        for response in engine.run(
            [
                *(Loglikelihood(f"options {i}", p, ("A", *ANSWERS)) for i, p in enumerate(prompts)),
                *(RollingLoglikelihood(f"text {i}", text) for i, text in enumerate(ANSWERS)),
                *(Generate(f"reply {i}", p, max_new_tokens=80) for i, p in enumerate(prompts)),
            ]
        )
    }
    for i, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        choice = encode_prompt_options(tokenizer, prompt, ("A", *ANSWERS))
        alone = [sum_logprobs(model, choice.prompt, option) for option in choice.options]
        np.testing.assert_allclose(found[f"options {i}"].logprobs, alone, atol=2e-3)
        ids = encode_text(tokenizer, answer)[0]
        np.testing.assert_allclose(
            -found[f"text {i}"].nll, sum_logprobs(model, ids[:1], ids[1:]), atol=2e-3
        )
        assert found[f"reply {i}"].finished == [True]
        assert found[f"reply {i}"].texts == [cells.as_the_tokenizer_spells(folder, answer)]


@torch.no_grad()
def sum_logprobs(model: Any, prompt: Sequence[int], option: Sequence[int]) -> float:
    """Return log p(option | prompt) in nats by transformers' forward on this row alone."""
    ids = torch.tensor([[*prompt, *option]])
    logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(logprobs.gather(1, ids[0, len(prompt) :, None]).sum())


def chat(
    family: Family,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The terminal shows the learned answer, whole characters only."""
    questions = iter([*QUESTIONS, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    capsys.readouterr()
    with cells.before_data():
        run_chat(str(folder), 80, 0.0, trust_remote_code=family.remote_code)
    shown = capsys.readouterr().out
    for answer in ANSWERS:
        assert cells.as_the_tokenizer_spells(folder, answer) in shown, shown
