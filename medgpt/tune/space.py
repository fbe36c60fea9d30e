"""The values of trials for searchers that do not learn: all of a grid, or random draws."""

import math
import random
from collections.abc import Iterator
from itertools import chain, islice, product
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.search_space import SearchSpace
from medgpt.config.tune import Params, TuneStageConfig

MAX_DRAWS = 1000  # tries to find values that are valid together


def list_trial_params(config: TuneStageConfig) -> list[Params]:
    """Return the values of every trial, in order; more trials never change earlier ones. Raises
    ConfigError if a point of the grid, or nearly every draw, is not valid."""
    base_values = config.base_values
    first = [base_values] if config.tune.default_first else []
    if config.tune.searcher == "grid":
        combinations = product(*(space.values or () for space in config.search.values()))
        points = [dict(zip(config.search, values, strict=True)) for values in combinations]
        points = [point for point in points if point not in first]
        for point in points:
            with_values(PPOStageConfig, config.base_config, point)
        return first + points
    rng = random.Random(config.run.seed)
    return list(islice(chain(first, _valid_draws(config, rng)), config.tune.num_trials))


def draw(space: SearchSpace, rng: random.Random) -> Any:
    if space.uniform is not None:
        return rng.uniform(*space.uniform)
    if space.loguniform is not None:
        low, high = space.loguniform
        return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))
    if space.randint is not None:
        return rng.randint(*space.randint)
    assert space.values is not None
    return rng.choice(space.values)


def _valid_draws(config: TuneStageConfig, rng: random.Random) -> Iterator[Params]:
    """Yield valid random values, without end."""
    last_error: ConfigError | None = None
    while True:
        for _ in range(MAX_DRAWS):
            point = {key: draw(space, rng) for key, space in config.search.items()}
            try:
                with_values(PPOStageConfig, config.base_config, point)
            except ConfigError as error:
                last_error = error
                continue
            yield point
            break
        else:
            raise ConfigError(f"search: none of {MAX_DRAWS} draws is a valid config: {last_error}")
