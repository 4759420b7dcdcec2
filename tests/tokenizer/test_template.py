"""chat_template.jinja renders the bytes of chat.render_text, and transformers the same mask."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from fledge.tokenizer import chat, files
from fledge.tokenizer.template import render_template

WORDS = st.text(alphabet="ab '\"<>&{}%\n\t\u00e9\u4e2d\U0001f600", max_size=16)


def conversations(words):
    """Strategy for messages of all roles and shapes, whose texts come from `words`."""

    def parts(kinds):
        return st.lists(
            st.builds(lambda k, t: {"type": k, "text": t}, st.sampled_from(kinds), words),
            max_size=4,
        )

    arguments = st.one_of(
        st.dictionaries(st.sampled_from(["city", "n", "code"]), st.one_of(words, st.integers())),
        st.dictionaries(words, words).map(lambda d: json.dumps(d, ensure_ascii=False)),
    )
    call = st.builds(
        lambda name, a: {"type": "function", "function": {"name": name, "arguments": a}},
        st.sampled_from(["weather", "lookup"]),
        arguments,
    )
    content = st.one_of(words, parts(["text", "python", "output"]))
    message = st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["system", "developer", "user", "tool"]),
                "content": st.one_of(words, parts(["text"])),
            }
        ),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": st.one_of(st.none(), content)},
            optional={"tool_calls": st.lists(call, max_size=2)},
        ),
    )
    return st.lists(message, min_size=1, max_size=7)


@given(messages=conversations(WORDS), prompt=st.booleans())
def test_same_bytes(messages, prompt):
    jinja = render_template(
        files.chat_template(), messages, bos_token="<|bos|>", add_generation_prompt=prompt
    )
    assert jinja == chat.render_text({"messages": messages}, add_generation_prompt=prompt)


def test_python_calls_are_code():
    call = {"function": {"name": "python", "arguments": {"code": "1+1"}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    jinja = render_template(files.chat_template(), messages, bos_token="<|bos|>")
    assert jinja == chat.render_text({"messages": messages})
    assert "<|python_start|>1+1<|python_end|>" in jinja


@pytest.mark.parametrize(
    "message",
    [
        {"role": "wizard", "content": "x"},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "content": [{"type": "audio"}]},
    ],
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(TemplateError):
        render_template(files.chat_template(), [message], bos_token="<|bos|>")


@pytest.fixture(scope="module")
def hf_apply(tok, tmp_path_factory):
    """apply_chat_template of transformers on our files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.save(folder)
    # A checkpoint's folder, whose config must not make transformers choose another class.
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    hf_tok = transformers.AutoTokenizer.from_pretrained(folder)

    def apply(messages, **options):
        return hf_tok.apply_chat_template(messages, return_dict=True, **options)

    return apply


# transformers looks up the token of the last character that is trained on, and so loses the rest
# of a character of several tokens: here every text ends in ASCII.
@given(messages=conversations(WORDS.map(lambda text: text + ".")))
def test_same_ids_and_mask_in_transformers(tok, hf_apply, messages):
    out = hf_apply(messages, return_assistant_tokens_mask=True)
    ids, mask = chat.render(tok, {"messages": messages})
    assert out["input_ids"] == ids
    assert out["assistant_masks"] == mask
    prompt = hf_apply(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == chat.render_prompt(tok, messages)
