import datetime

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
from medgpt.data.tokenized.render_template import render
from medgpt.data.tokenized.template_choice import freeze_date, freeze_template, read_template
from medgpt.models.tokenizer import load_tokenizer
from tests.models.chat_templates import TRL_TEMPLATES
from tests.models.chat_tokenizers import base_tokenizer, chat_tokenizer

QUESTION = (Message("user", "我头痛"),)


@pytest.mark.parametrize("family", ["llama3.2", "gpt-oss"])
def test_the_date_is_that_of_the_config_whenever_it_is_rendered(family, tmp_path):
    day = datetime.date(2025, 3, 4)
    tokenizer = freeze_template(base_tokenizer(family), TokenizerConfig(date=day))
    shown = {"llama3.2": "Today Date: 04 Mar 2025", "gpt-oss": "Current date: 2025-03-04"}[family]
    assert shown in render(tokenizer, QUESTION)
    assert "strftime_now(" not in tokenizer.chat_template
    prepare_chat_tokenizer(tokenizer).save_pretrained(tmp_path)
    assert shown in render(load_tokenizer(str(tmp_path)), QUESTION)


def test_a_template_that_asks_for_the_day_prints_the_default_date_unless_told_another(tmp_path):
    base_tokenizer("llama3.2").save_pretrained(tmp_path)
    assert "Today Date: 26 Jul 2024" in render(load_tokenizer(str(tmp_path)), QUESTION)
    other = load_tokenizer(str(tmp_path), date=datetime.date(2025, 1, 2))
    assert "Today Date: 02 Jan 2025" in render(other, QUESTION)


def test_a_date_whose_format_is_computed_is_refused():
    with pytest.raises(ConfigError, match="computes the format"):
        freeze_date("{{ strftime_now(format) }}")


def test_a_template_can_be_a_file_or_one_of_trl(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}", "utf-8")
    config = TokenizerConfig(chat_template=str(path))
    assert freeze_template(base_tokenizer("qwen3"), config).chat_template == path.read_text("utf-8")
    assert read_template("qwen3_training") == (TRL_TEMPLATES / "qwen3_training.jinja").read_text(
        "utf-8"
    )
    with pytest.raises(ConfigError, match="did you mean qwen3_training"):
        read_template("qwen3_trainig")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_template(str(tmp_path / "missing.jinja"))


def test_thinking_cannot_be_switched_where_the_template_has_no_switch():
    with pytest.raises(ConfigError, match="no switch for thinking"):
        chat_tokenizer("qwen2.5", "off")
