"""Every message of the table: its class, its exit code, the value it names, and its hint."""

from collections import Counter

import pytest
from message_table import read_messages

MESSAGES = read_messages()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_a_message_names_the_value_and_says_what_to_do(message, shop):
    with pytest.raises(message.error) as raised:
        message.trigger(shop)
    assert type(raised.value) is message.error
    assert raised.value.exit_code == message.exit_code
    for part in message.says:
        assert part in raised.value.message
    assert message.hint
    assert message.hint in (raised.value.hint or raised.value.message)  # a list of problems has its hints in the lines


def test_every_message_has_a_name_of_its_own():
    assert [name for name, count in Counter(message.name for message in MESSAGES).items() if count > 1] == []
