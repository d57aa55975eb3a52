"""The command line, as far as it needs no process of its own."""

import logging

from mmengine.logging import MMLogger, print_log

from gfnet_dense.cli import _class_names, _without_chatter


def test_a_quiet_verb_leaves_the_console_to_what_follows(capsys, monkeypatch):
    monkeypatch.setattr(MMLogger, '_instance_dict', {})
    with _without_chatter():
        print('Could not import something')
        print_log('about itself', 'current', logging.WARNING)
    print_log('what the user needs', 'current', logging.INFO)
    out = capsys.readouterr().out
    assert 'what the user needs' in out
    assert 'itself' not in out and 'Could not' not in out


def test_class_names_of_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / 'classes.txt'
    file.write_text('one\ntwo\n', encoding='utf-8-sig')
    assert _class_names(str(file)) == ['one', 'two']
