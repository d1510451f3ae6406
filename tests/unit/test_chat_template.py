"""Chat templates: the forms that models come with, and templates that mean harm."""

from __future__ import annotations

import time
from datetime import datetime
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tightwad_agent.errors import Unsupported
from tightwad_agent.proxy.chat_template import BadTemplate, ChatTemplate
from tightwad_agent.proxy.fields import BadField
from tightwad_agent.proxy.messages import Message
from tightwad_agent.proxy.template_sandbox import MAX_TEMPLATE

NOW = datetime(2026, 3, 5, 14, 7)
HELLO = Message("user", "Hello")
TALK = [Message("system", "Be kind."), HELLO, Message("assistant", "Hi!"), Message("user", " How are you? ")]

# In the manner of each family, written for these tests

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages -%}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Roles must alternate.") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

PARTS = """\
{% for message in messages %}<|{{ message.role }}|>\
{% for part in message.content %}{% if part['type'] == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

THINKER = """\
{%- macro said(message) -%}
    {%- if message.content is string -%}{{ message.content.split('</think>')[-1].lstrip('\n') }}
    {%- else -%}{{ message.content | map(attribute='text') | join('') }}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}{%- continue -%}{%- endif -%}
    [{{ message.role | upper }}]{{ said(message) }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    [ASSISTANT]{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- endif -%}
"""


@cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>")


def render(source: str, messages=TALK, **more) -> str:
    return template(source).render(messages, now=NOW, **more)


class TestFamilies:
    def test_smollm(self):
        assert render(SMOLLM, [HELLO]) == (
            "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_chatml_stands_in(self):
        assert render("") == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\n How are you? <|im_end|>\n<|im_start|>assistant\n"
        )

    def test_llama3(self):
        assert render(LLAMA3) == (
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 05 Mar 2026\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    def test_gemma_gets_the_system_message_with_the_first_other(self):
        assert not template(GEMMA).takes_system
        assert render(GEMMA) == (
            "<s><start_of_turn>user\nBe kind.\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
            "<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n"
        )
        assert "<start_of_turn>user\nBe kind.<end_of_turn>" in render(GEMMA, TALK[:1])

    def test_what_a_template_refuses_is_the_request_s_fault(self):
        with pytest.raises(BadField, match="Conversation roles must alternate") as caught:
            render(GEMMA, [HELLO, HELLO])
        assert caught.value.param == "messages"

    def test_mistral(self):
        assert template(MISTRAL).takes_system
        assert render(MISTRAL) == "<s>[INST] Hello[/INST] Hi!</s>[INST] Be kind.\n\n How are you? [/INST]"

    def test_contents_as_parts(self):
        assert template(PARTS).typed
        assert render(PARTS, [HELLO]) == "<|user|>Hello<|assistant|>"
        assert not any(template(source).typed for source in (SMOLLM, LLAMA3, GEMMA, MISTRAL, THINKER))

    def test_macros_methods_and_loop_controls(self):
        said = [HELLO, Message("assistant", "<think>Hm</think>\nHi!"), Message("user", "Go")]
        assert render(THINKER, said) == "[USER]Hello[ASSISTANT]Hi![USER]Go[ASSISTANT]"

    def test_developer_is_system_to_a_template_that_does_not_know_it(self):
        assert render(SMOLLM, [Message("developer", "x"), HELLO]).startswith("<|im_start|>system\nx")
        assert "developer" in render("{# developer #}" + SMOLLM, [Message("developer", "x"), HELLO])


class TestWhatTemplatesUse:
    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("{{ {'b': [1, 'é<'], 'a': none} | tojson }}", '{"b": [1, "é<"], "a": null}'),
            ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
            ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
            ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
            ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
            ("{% generation %}x{% endgeneration %}y", "xy"),
            ("{{ 'a-b' | replace('-', '+') ~ 1 ~ none }}", "a+b1None"),
            ("{{ 'x' * 3 + 'y' }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 5) }}", "xxxy10243a-5"),
            ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
            ("{{ messages | map(attribute='content') | join('|') }}", "Hello"),
            ("{{ ', '.join(['a', 'b']) }}{{ 'aXb'.replace('X', '-') }}", "a, ba-b"),
            ("{% set x %}<{{ messages[0].content }}>{% endset %}{{ x | length }}{{ x }}", "7<Hello>"),
            ("{% set ns = namespace(a=[]) %}{% set ns.a = ns.a + [1] %}{{ ns.a }}", "[1]"),
            ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
            (
                "{% for m in messages %}{{ loop.first and loop.last }}{{ loop.previtem is defined }}{% endfor %}",
                "TrueFalse",
            ),
            ("{{ nothing }}{{ nothing is defined }}{{ nothing | default('d') }}", "Falsed"),
            ("{{ '1' | int + 1 }}{{ 2.567 | round(1) }}{{ [3, 1] | sort | first }}", "22.61"),
            ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
            ("{{ '{} {{x}} {b}'.format(1, b=none) }}{{ '{1}{0}'.format('a', 'b') }}", "1 {x} Noneba"),
            ("{% for m in messages %}{{ m.content.replace('l', 'L') }}{{ '-'.join('ab') }}{% endfor %}", "HeLLoa-b"),
            ("{{ '<&>' | e }}{{ '<' | safe }}", "&lt;&amp;&gt;<"),
            ("{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}", "[x]"),
            ("{{ strftime_now('%Y-%m-%d %-H') }}", "2026-03-05 14"),
            ("{{ bos_token }}{{ eos_token }}{{ tools }}", "<s></s>None"),
            ("{{ (messages | first).get('content', 'x') }}{{ messages[0].get('nope', 'x') }}", "Hellox"),
            ("{{ 'é' | upper }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}", "Ébccba"),
            ("{{ 'b' in 'abc' }}{{ 1 < 2 < 3 }}{{ 'x' is string }}", "TrueTrueTrue"),
        ],
    )
    def test_one(self, source, text):
        assert render(source, [HELLO]) == text


def plainly(source: str, messages) -> str:
    """As `transformers` does it: jinja2's own sandbox, without ours."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    names = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    env.globals |= {"strftime_now": NOW.strftime, "raise_exception": pytest.fail}
    return env.from_string(source).render(messages=[{"role": m.role, "content": m.content} for m in messages], **names)


@pytest.mark.parametrize("source", [SMOLLM, LLAMA3, MISTRAL, THINKER], ids=["smollm", "llama3", "mistral", "thinker"])
@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), max_size=4), st.text(), st.booleans())
def test_the_meter_changes_nothing(source, turns, last, system):
    said = [Message("system", last)] * system
    for user, assistant in turns:
        said += [Message("user", user), Message("assistant", assistant)]
    said.append(Message("user", last))
    assert render(source, said) == plainly(source, said)


class TestOptions:
    def test_the_answer_may_be_begun(self):
        said = [HELLO, Message("assistant", "Well, ")]
        assert render(SMOLLM, said, continues=True).endswith("Hello<|im_end|>\n<|im_start|>assistant\nWell, ")
        with pytest.raises(BadField):
            render(SMOLLM, said[1:], continues=True)

    def test_no_generation_prompt(self):
        assert render(SMOLLM, [HELLO], add_generation_prompt=False).endswith("Hello<|im_end|>\n")

    def test_options_reach_the_template(self):
        assert render(THINKER, [HELLO], options={"enable_thinking": False}).endswith("<think></think>")
        assert render(THINKER, [HELLO], options={"enable_thinking": True}).endswith("[ASSISTANT]")

    @pytest.mark.parametrize(
        ("options", "param"),
        [
            ({"enable_thinking": True}, "chat_template_kwargs.enable_thinking"),
            ({"reasoning_effort": "high"}, "reasoning_effort"),
        ],
    )
    def test_what_a_template_does_not_know_is_refused(self, options, param):
        with pytest.raises(Unsupported) as caught:
            render(SMOLLM, [HELLO], options=options)
        assert caught.value.param == param

    def test_asking_for_nothing_is_not_refused(self):
        assert render(SMOLLM, [HELLO], options={"enable_thinking": False}) == render(SMOLLM, [HELLO])

    @pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt", "raise_exception", "range"])
    def test_names_that_are_not_theirs(self, name):
        with pytest.raises(BadField):
            render(SMOLLM, [HELLO], options={name: "x"})

    @settings(deadline=None)
    @given(st.text(), st.text())
    def test_text_goes_through_unchanged(self, system, user):
        """What a message says is never read as a template."""
        said = [Message("system", system), Message("user", user)]
        assert render("", said) == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_markup_in_messages_stays(self):
        assert "{{ 7*7 }}<b>&amp;" in render(LLAMA3, [Message("user", "{{ 7*7 }}<b>&amp;")])


MANY = 100_000
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__ }}",
    "{{ messages[0]['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.func }}{{ strftime_now.args }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{% for x in [1] %}{{ loop._iterator }}{{ loop.__init__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func }}{{ m._environment }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0[__class__]}'.format(1) }}",
    "{{ '{a!r}'.format(a=1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% for m in messages %}{{ '{0.__class__}'.format(m) }}{% endfor %}",
    "{{ '{0.__class__}' | format(1) }}",
    "{{ 'x'.encode() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ (1).to_bytes(5, 'big') }}",
    "{{ [].copy }}{{ {}.setdefault }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
]
_DOUBLE = "{% for i in range(100) %}{% set ns.s = "
GREEDY = [
    f"{{% for i in range({MANY}) %}}{{% for j in range({MANY}) %}}{{% endfor %}}{{% endfor %}}",
    f"{{% for i in range({MANY}) if range({MANY}) | list | length < 0 %}}{{% endfor %}}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 5 | round(10 ** 9, 'ceil') }}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "'%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "'%s%s' | format(ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "ns.s | replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "ns.s.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "[ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='a') %}" + _DOUBLE + "ns.s.join(['', '', '']) %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}" + _DOUBLE + "[ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}" + _DOUBLE + "(ns.s, ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}" + _DOUBLE + "{'a': ns.s, 'b': ns.s} %}{% endfor %}{{ ns.s | tojson }}",
    "{% set ns = namespace(s=[1]) %}" + _DOUBLE + "dict(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}" + _DOUBLE + "ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=1) %}" + _DOUBLE + "namespace(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{{ [namespace()] }}",
    "{{ namespace() | upper }}",
    "{{ messages | join(attribute='content') }}",
    "{{ ('\n' * 5000000) | tojson }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{{}:>999999999}'.format(1) }}",
    "{{ ('{0}' * 9000).format('a' * 9000) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.center(10 ** 9) }}",
    "{{ 'a\tb'.expandtabs(10 ** 9) }}",
    "{{ 'a' | indent(10 ** 9) | length }}{{ 1 / 0 }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ messages | tojson(separators=('a' * 1000, ':')) }}",
    "{{ strftime_now('%999999d') }}",
    "{{ ('a' * 8000000).split('a') | length }}",
    "{{ ('a' * 8000000) | list | length }}",
    "{% for c in 'a' * 8000000 %}{% endfor %}",
    f"{{% for i in range({MANY}) %}}{{{{ 'a' * 9000 }}}}{{% endfor %}}",
    f"{{% for i in range({MANY}) %}}" + "x" * 9000 + "{% endfor %}",
    f"{{% set x %}}{{% for i in range({MANY}) %}}{{{{ 'a' * 9000 }}}}{{% endfor %}}{{% endset %}}",
    f"{{% set s = 'a' * 8000000 %}}{{% for i in range({MANY}) %}}{{% set x = s[::-1] %}}{{% endfor %}}",
    f"{{% set s = 'a' * 8000000 %}}{{% for i in range({MANY}) %}}{{% set x = 'b' in s %}}{{% endfor %}}",
    f"{{% set s = 'a' * 8000000 %}}{{% for i in range({MANY}) %}}{{% set x = s | upper %}}{{% endfor %}}",
    f"{{{{ range({MANY})" + " | map('string')" * 20 + " | list | length }}",
    f"{{{{ range({MANY})" + " | select" * 40 + " | list | length }}",
    "{{" + "(" * 9000 + "1" + ")" * 9000 + "}}",
    "{{ 1" + " + 1" * 9000 + " }}",
    "{{ a" + ".b" * 9000 + " }}",
    "{{ " + "-" * 9000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "x" * (MAX_TEMPLATE + 1),
]
BROKEN = [
    "{{ messages[0].content",
    "{% for %}",
    "{% nosuchtag %}",
    "{{ 1 | nosuchfilter }}",
    "{{ 1 / 0 }}",
    "{{ {}['a'].b }}",
    "{{ 1 + 'a' }}",
    "{{ none() }}",
    "{{ [1][5].a }}",
]


class TestHarm:
    @pytest.mark.parametrize("source", ESCAPES)
    def test_nothing_of_python_is_reached(self, source):
        """Refused, or an undefined name, which is written as nothing."""
        try:
            text = render(source, [HELLO])
        except BadTemplate:
            return
        assert text.strip("[], ") in ("", "None", "Undefined") or text == "{0.__class__}"

    @pytest.mark.parametrize("source", GREEDY, ids=range(len(GREEDY)))
    def test_nothing_runs_or_grows_without_end(self, source):
        began = time.process_time()
        with pytest.raises(BadTemplate) as caught:
            render(source, [HELLO])
        assert time.process_time() - began < 10  # seconds of a busy machine; each would take hours or gigabytes
        assert len(caught.value.message) < 400

    def test_lists_are_measured_with_all_that_is_inside(self):
        """Each is made of the one before, twice: 20 lines that would print a million items."""
        source = "{% set ns = namespace(s=[1]) %}" + "{% set ns.s = [ns.s, ns.s] %}" * 20 + "{{ ns.s }}"
        with pytest.raises(BadTemplate, match="a list that is too long"):
            render(source, [HELLO])

    @pytest.mark.parametrize("source", BROKEN)
    def test_faults_are_said(self, source):
        with pytest.raises(BadTemplate, match="chat template cannot be used") as caught:
            render(source, [HELLO])
        assert caught.value.http_status == 400

    def test_long_chats_are_no_harm(self):
        said = [Message("user" if i % 2 == 0 else "assistant", "word " * 40) for i in range(4001)]
        assert len(render(MISTRAL, said)) > 4001 * 200
        assert len(render(LLAMA3, [Message("user", "x" * 6_000_000)])) > 6_000_000

    def test_renderings_do_not_pay_for_each_other(self):
        once = template("{% for i in range(90000) %}{{ i }}{% endfor %}")
        assert len({once.render([HELLO], now=NOW) for _ in range(6)}) == 1
