"""Rendered chats, and their ids, are those of transformers."""

import pytest
from flume_router.chat_template import ChatOptions, ChatTemplate, TemplateBroken, TemplateRefused
from hypothesis import given, settings
from hypothesis import strategies as st

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Naïve 日本語 🙂?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "  spaces  \n\n and <|im_end|> inside"},
    ],
    [{"role": "user", "content": ""}],
]
TEMPLATES = [
    "{% for m in messages %}\n    {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\n{{ bos_token }}",
    "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}<b>&",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "{% set n = namespace(a='') %}{% for m in messages %}{% set n.a = m.role %}{% endfor %}{{ n.a }}",
    "{{ tools is none }}{{ documents is none }}{{ missing }}{{ add_generation_prompt }}{{ eos_token }}",
    "{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("messages", CHATS)
def test_chats_have_the_ids_of_transformers(text_model, reference, messages):
    text = text_model.chat_template.render(messages)
    assert text == reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = text_model.tokenizer.encode_now(text, add_special_tokens=False)
    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]),
        "content": st.text(st.characters(exclude_categories=["Cs"])),
    }
)


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4))
def test_any_chat_has_the_ids_of_transformers(text_model, reference, messages):
    ids = text_model.tokenizer.encode_now(text_model.chat_template.render(messages), add_special_tokens=False)
    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_templates_render_as_in_transformers(reference, source, messages):
    ours = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    theirs = reference.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert ours.render(messages) == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content + 'x' }}",
        "{{ 'a' + 5 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_cannot_do_is_an_answer_to_the_client(source):
    with pytest.raises(TemplateRefused):
        ChatTemplate(source, {}).render(CHATS[0])


def test_a_template_tells_why_it_refuses():
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(CHATS[0])


def test_a_broken_template_is_found_when_it_is_loaded():
    with pytest.raises(TemplateBroken, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


async def test_a_refusal_of_the_template_is_a_bad_request(http, monkeypatch, text_model):
    monkeypatch.setattr(
        text_model.chat_template, "_template", ChatTemplate("{{ raise_exception('no') }}", {})._template
    )
    answer = await http.post("/v1/chat/completions", json={"model": "smollm2-135m", "messages": CHATS[0]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert answer.json()["error"]["message"].endswith(": no")


PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}[{{ p['text'] }}]{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
)
TWO = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "source, content, text",
    [
        (PARTS, "a", "[a]"),
        (PARTS, TWO, "[a][b]"),
        (EITHER, "a", "a"),
        (EITHER, TWO, "[a][b]"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", TWO, "a\nb"),
        ("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", TWO, "a\nb!"),
    ],
)
def test_content_comes_in_the_form_a_template_takes(source, content, text):
    assert ChatTemplate(source, {}).render([{"role": "user", "content": content}]) == text


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ '%9999999999d' % 1 }}",
    ],
)
def test_a_template_without_end_is_refused_when_it_is_loaded(source):
    with pytest.raises(TemplateBroken, match="with one short message"):
        ChatTemplate(source, {})


def test_a_template_that_never_ends_with_some_messages_refuses_those():
    source = "{% macro f() %}{{ f() }}{% endmacro %}{% if messages | length > 1 %}{{ f() }}{% endif %}ok"
    template = ChatTemplate(source, {})
    assert template.render(CHATS[0]) == "ok"
    with pytest.raises(TemplateRefused, match="calls itself"):
        template.render(CHATS[1])


@pytest.mark.parametrize("filtered", ["m.content", "m.content | trim"])
def test_a_final_message_is_continued(filtered):
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ " + filtered + " }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Sure"}]
    options = ChatOptions(continue_final_message=True)
    assert ChatTemplate(source, {}).render(messages, options) == "<user>Q</><assistant>Sure"
    assert ChatTemplate(source, {}).render(messages).endswith("Sure</><assistant>")
    with pytest.raises(TemplateRefused, match="must be the assistant's"):
        ChatTemplate(source, {}).render(messages[:1], options)


def test_a_template_has_the_variables_of_the_client():
    template = ChatTemplate("{% if enable_thinking is defined and not enable_thinking %}no{% endif %}", {})
    assert template.render(CHATS[0], ChatOptions(variables={"enable_thinking": False})) == "no"
    assert template.render(CHATS[0]) == ""


@pytest.mark.parametrize(
    "shown, text",
    [("c.function.arguments | tojson", '{"a": 1}'), ("'args: ' + c.function.arguments", 'args: {"a":1}')],
)
def test_arguments_of_tool_calls_come_in_the_form_a_template_takes(shown, text):
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ " + shown + " }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert ChatTemplate(source, {}).render(messages) == text
