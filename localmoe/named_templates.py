"""Chat templates by name, for files that have none or a wrong one: jinja2 sources alone, compiled elsewhere.

Written from the models' documented prompt formats and compared with the real templates (`tests/test_template.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

_TURN = "{% for message in messages %}"
_ALTERNATING = (
    "{% set system = messages[0].content if messages and messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% set lead = SYSTEM if loop.first and system else '' %}"
)
_HARMONY_SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\n"
    "Reasoning: {{ reasoning_effort | default('medium') }}\n\n# Valid channels: analysis, commentary, final. Channel "
    "must be included for every message.<|end|>"
)


def _mistral(space: str, *, inside: str = "", own_system: bool = False, answer: str = "message.content") -> str:
    """`space` behind every marker, `inside` in front of [/INST]; a turn of its own for the system prompt, or not."""
    system = f"[SYSTEM_PROMPT]{space}{{{{ message.content }}}}[/SYSTEM_PROMPT]"
    turns = _TURN if own_system else _ALTERNATING.replace("SYSTEM", "system ~ '\n\n'")
    return (
        "{{ bos_token }}" + turns + "{% if message.role == 'user' %}[INST]" + (inside or space) + "{{ "
        + ("" if own_system else "lead ~ ") + "message.content }}" + inside + "[/INST]"
        + ("{% elif message.role == 'system' %}" + system if own_system else "")
        + "{% else %}" + space + "{{ " + answer + " }}{{ eos_token }}{% endif %}{% endfor %}"
    )  # fmt: skip


def _deepseek(opening: str) -> str:
    """The form of V2.5, V3 and R1; `opening` stands at the beginning of the answer that is asked for."""
    return (
        "{{ bos_token }}" + _TURN + "{% if message.role == 'user' %}<\uff5cUser\uff5c>{{ message.content }}"
        "{% elif message.role == 'assistant' %}<\uff5cAssistant\uff5c>"
        "{{ message.content.split('</think>') | last }}{{ eos_token }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>" + opening + "' }}{% endif %}"
    )


NAMED: Mapping[str, str] = {
    "alpaca": _TURN + "{% if message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}",
    "chatml": _TURN + "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "command-r": "{{ bos_token }}{% set roles = {'user': 'USER', 'assistant': 'CHATBOT'} %}"
    + _TURN
    + "<|START_OF_TURN_TOKEN|><|{{ roles.get(message.role, 'SYSTEM') }}_TOKEN|>"
    "{{ message.content }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
    "deepseek": _deepseek(""),
    "deepseek-r1": _deepseek("<think>\\n"),
    "deepseek-v2": "{{ bos_token }}" + _TURN + "{% if message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "gemma": "{{ bos_token }}"
    + _ALTERNATING.replace("SYSTEM", "system ~ '\n\n'")
    + "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ lead ~ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "glm4": "[gMASK]<sop>" + _TURN + "{{ '<|' ~ message.role ~ '|>\n' ~ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "gpt-oss": _HARMONY_SYSTEM + _TURN + "{% if message.role == 'system' %}<|start|>developer<|message|># Instructions"
    "\n\n{{ message.content }}\n\n<|end|>"
    "{% elif message.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ message.content.split('<|channel|>final<|message|>') | last }}<|end|>"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "granite": _TURN + "{{ '<|start_of_role|>' ~ message.role ~ '<|end_of_role|>' ~ message.content "
    "~ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
    "llama2": _ALTERNATING.replace("SYSTEM", "'<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n'")
    + "{% if message.role == 'user' %}{{ bos_token }}[INST] {{ lead ~ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}" + _TURN + "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama4": "{{ bos_token }}" + _TURN + "<|header_start|>{{ message.role }}<|header_end|>\n\n"
    "{{ message.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}",
    "mistral-v1": _mistral(" ", inside=" ", answer="message.content | trim"),
    "mistral-v3": _mistral(" ", answer="message.content | trim"),
    "mistral-v3-tekken": _mistral(""),
    "mistral-v7": _mistral(" ", own_system=True, answer="message.content | trim"),
    "mistral-v7-tekken": _mistral("", own_system=True),
    "phi3": _TURN + "{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "phi4": _TURN + "{{ '<|im_start|>' ~ message.role ~ '<|im_sep|>' ~ message.content ~ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    "phi4-mini": _TURN + "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "vicuna": _TURN + "{% if message.role == 'user' %}USER: {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content | trim }}{{ eos_token }}\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "zephyr": _TURN + "{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
# Other names, and the first form that each means; `template_fit.fitted` looks at the vocabulary before it settles.
ALIASES: Mapping[str, str] = {
    "cohere": "command-r", "deepseek-v3": "deepseek", "glm": "glm4", "harmony": "gpt-oss", "mistral": "mistral-v3",
    "phi": "phi3", "qwen": "chatml",
}  # fmt: skip
