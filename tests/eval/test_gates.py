import pytest

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.config.gates import parse_gate
from medgpt.config.loading import validate
from medgpt.eval.gates import GateFailure, check_gates, require_passed


def score(value: float, n: int = 100) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def results(
    accuracy: float,
    *,
    passed: float = 1.0,
    nll: float = 2.0,
    data: str = "d",
    template: str = "t",
    rules: str = "r",
) -> dict:
    provenance = {"data_hash": data, "template": template, "rules": rules}
    return {
        "tasks": {
            "mcq": {
                "kind": "mcq",
                **provenance,
                "metrics": {"accuracy": score(accuracy), "invalid_rate": score(0.0)},
                "slices": {
                    "department": {
                        "儿科": {"accuracy": score(0.25, 4)},
                        "妇产科 (门诊)": {"accuracy": score(0.5, 4)},
                        "chapter 3.1": {"accuracy": score(0.75, 4)},
                        "age < 3": {"accuracy": score(0.75, 4)},
                    }
                },
            },
            "key_points": {
                "kind": "key_points",
                **provenance,
                "metrics": {"passed": score(0.5)},
                "slices": {"topic": {"diabetes": {"passed": score(passed, 1)}}},
            },
            "nll": {
                "kind": "nll",
                **provenance,
                "metrics": {"nll_per_token": score(nll)},
                "slices": {"text": {"general": {"nll_per_token": score(nll)}}},
            },
        }
    }


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("mcq.accuracy >= parent", True),
        ("mcq.accuracy>parent", False),
        ("mcq.accuracy >= parent + 0.01", False),
        ("mcq.accuracy >= parent - 0.02", True),
        ("mcq.accuracy >= 0.5", True),
        ("mcq.accuracy < 5e-1", False),
        ("mcq.invalid_rate == 0", True),
        ("mcq.儿科 >= 0.3", False),
        ("mcq.儿科.accuracy >= 0.25", True),
        ("mcq.妇产科 (门诊) >= 0.5", True),
        ("mcq.妇产科 (门诊).accuracy > 0.5", False),
        ('mcq."chapter 3.1".accuracy >= 0.75', True),
        ("mcq.'chapter 3.1' >= 0.75", True),
        ('mcq."age < 3" >= 0.76', False),
        ("key_points.diabetes == pass", True),
        ("key_points.passed == pass", False),
        ("nll.general <= 1.05 * parent", False),
        ("nll.general <= 1.1*parent", True),
        ("nll.nll_per_token <= 1.05 * parent + 0.1", True),
        ("low(mcq.accuracy) > 0.39", True),
        ("low(mcq.accuracy) >= 0.41", False),
        ("high(nll.general) <= 1.1 * parent", False),
        ("high( mcq.儿科.accuracy )<=0.36", True),
    ],
)
def test_a_gate_compares_a_score_with_its_bound(text, passes):
    ours, theirs = results(0.5, nll=2.18), results(0.5, nll=2.0)
    (found,) = check_gates([text], ours, theirs)
    assert found.passed is passes
    assert (found.parent is None) == ("parent" not in text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "mcq.accuracy", "mcq >= 0.5", "accuracy >= 0.5", "mcq.accuracy => 0.5"),
        *("mcq.accuracy >= parents", "mcq.accuracy >= parent * 2", "mcq.accuracy >= 0.5 0.6"),
        *(
            "mcq.accuracy >= 1.05 parent",
            "a.b.c.d >= 1",
            "mcq.accuracy >= pass",
            "mcq.accuracy = 1",
        ),
        *("mcq.accuracy >= -1 * parent", "mcq.accuracy >= parent; 1", "mcq.accuracy >= nan"),
        *("low(mcq.accuracy >= 1", "mid(mcq.accuracy) >= 1", "low(low(mcq.accuracy)) >= 1"),
        *('mcq."accuracy >= 1', "mcq. >= 1", ".accuracy >= 1", 'mcq."" >= 1', "mcq.a < 3 >= 1"),
    ],
)
def test_a_malformed_gate_is_an_error(text):
    with pytest.raises(ValueError, match="gate"):
        parse_gate(text)


def test_an_unknown_score_is_an_error_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"no score is called mcq\.acuracy; did you mean mcq\.acc"
    ):
        check_gates(["mcq.acuracy >= 0.5"], results(0.5), None)
    with pytest.raises(ConfigError, match=r"did you mean key_points\.diabetes"):
        check_gates(["key_points.diabets == pass"], results(0.5), None)


def test_a_parent_that_is_missing_or_not_comparable_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.parent is unset"):
        check_gates(["mcq.accuracy >= parent"], results(0.5), None)
    with pytest.raises(ConfigError, match="other questions"):
        check_gates(["mcq.accuracy >= parent"], results(0.5), results(0.5, data="other"))
    with pytest.raises(ConfigError, match="the parent's evaluation used another prompt"):
        check_gates(["mcq.accuracy >= parent"], results(0.5), results(0.5, template="chat"))
    with pytest.raises(ConfigError, match="the parent's evaluation was graded by other rules"):
        check_gates(["mcq.accuracy >= parent"], results(0.5), results(0.5, rules="older"))
    theirs = results(0.5)
    del theirs["tasks"]["mcq"]
    with pytest.raises(
        ConfigError, match=r"model\.parent: gate .* no score is called mcq\.accuracy"
    ):
        check_gates(["mcq.accuracy >= parent"], results(0.5), theirs)


def test_a_gate_failure_lists_every_failed_gate_with_its_evidence():
    gates = ["mcq.accuracy >= parent", "key_points.diabetes == pass", "nll.general <= 3"]
    evidence = check_gates(gates, results(0.4, passed=0.0), results(0.5))
    with pytest.raises(GateFailure) as failure:
        require_passed(evidence)
    assert str(failure.value) == (
        "failed 2 of 3 gates: mcq.accuracy >= parent: 0.4000 (0.3000 to 0.5000, 95 %, n=100), the "
        "parent has 0.5000; key_points.diabetes == pass: 0.0000 (-0.1000 to 0.1000, 95 %, n=1)"
    )
    require_passed(check_gates(gates, results(0.5), results(0.5)))


def config(**keys) -> EvalConfig:
    return validate(EvalConfig, {"run": {"dir": "/x"}, "nll": [{"general": True}], **keys})


def test_a_wrong_gate_is_an_error_when_the_config_is_loaded():
    assert config(gates=["nll.general <= 3"]).gates == ("nll.general <= 3",)
    for gate, message in (
        ("nll.general <= 3 *", "cannot be parsed"),
        ("nl.general <= 3", "no task is called nl; did you mean nll?"),
        ("nll.general <= parent", "model.parent is unset"),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("?", r"\?")):
            config(gates=[gate])
    assert config(gates=["nll.general <= parent"], model={"parent": "/before"}).gates
