#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Writes completion.bash and _tarsnap, for bash and zsh, beside this file.

They come from the tables from which the programs parse their command lines,
so this is run again whenever an option is added; tests/test_completions.py
fails until then.  To use them:

    . contrib/completion.bash               in ~/.bashrc
    fpath=(.../contrib $fpath)              in ~/.zshrc, before compinit
"""

import os
import sys
import textwrap

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import keygen       # noqa: E402
import tarsnap      # noqa: E402

NOTE = '''# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
# Written by contrib/completions.py; change that instead.
'''

# What an argument may be, by its name in the help: words; others are free.
WORDS = {'METHOD:ARG': 'dev:tty-stdin dev:tty-once dev:stdin-once env: file:',
         'LEVEL': 'none 1 2 3 4 5 6 7 8 9'}

# The arguments of the key tools' options.
KEY_ARGUMENTS = {
    '--keyfile': 'FILE', '--outkeyfile': 'FILE', '--oldkey': 'FILE',
    '--newkey': 'FILE', '--print-key-id': 'FILE',
    '--print-key-permissions': 'FILE', '--print-fingerprint': 'FILE',
    '--oldcachedir': 'DIR', '--newcachedir': 'DIR',
    '--passphrase': 'METHOD:ARG', '--new-passphrase': 'METHOD:ARG'}
KEY_TOOLS = {'tarsnap-keygen': keygen.KEYGEN_OPTIONS,
             'tarsnap-keyregen': keygen.KEYREGEN_OPTIONS,
             'tarsnap-keymgmt': keygen.KEYMGMT_OPTIONS,
             'tarsnap-recrypt': keygen.RECRYPT_OPTIONS}


def client_options():
    """[(option with its dashes, argument or '', help)] of tarsnap."""
    parser, rows = tarsnap.Parser([]), []
    for names, dashes in ((parser.letters, '-'), (parser.longs, '--')):
        for name, row in names.items():
            if isinstance(row, tarsnap.Option):
                off = row.negative and name == 'no-' + row.name
                bound = off or '=' in tarsnap.ALIASES.get(name, '')
                rows.append((dashes + name, '' if bound else row.arg,
                             'not: ' * off + row.text))
            else:
                rows.append((dashes + name, '', row[3]))
    return sorted(rows)


def key_options(table):
    """The same of a key tool."""
    return sorted((option, '' if kind in (keygen.FLAG, keygen.AGAIN) else
                   KEY_ARGUMENTS.get(option, 'VALUE'), '')
                  for option, kind in table.items())


def programs():
    """program -> its options."""
    found = {'tarsnap': client_options()}
    for name, table in KEY_TOOLS.items():
        found[name] = key_options(table)
    return found


# bash.

BASH = r'''
# The options of a program, and what may follow one of them.
_tarsnap_options() {
    case $1 in
%s    esac
}

_tarsnap_argument() {
    case $1 in
%s    esac
}

_tarsnap() {
    local word=$2 before=$3 kind IFS=$' \t\n'
    # A break at `=` leaves --name, = and the argument.
    [[ $word == = ]] && word=
    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    kind=$(_tarsnap_argument "${1##*/} $before")
    case $kind in
    FILE) compopt -o default ;;
    DIR) compopt -o dirnames ;;
    [A-Z]*) ;;
    ?*) COMPREPLY=($(compgen -W "$kind" -- "$word")) ;;
    '')
        case $word in
        -*) COMPREPLY=($(compgen -W "$(_tarsnap_options "${1##*/}")" \
            -- "$word")) ;;
        *) compopt -o default ;;
        esac ;;
    esac
}

complete -F _tarsnap \
    %s
'''


def fill(text, indent, end):
    """`text` in lines of less than 80 columns that end with `end`."""
    return (end + '\n').join(textwrap.wrap(
        text, 77, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False))


def bash_case(patterns, text):
    """A branch of a case command."""
    # A pattern is two words, between which no line may end.
    line = ' | '.join("'%s'" % pattern.replace(' ', '\0')
                      for pattern in patterns) + ')'
    return '%s\n        echo "%s" ;;\n' % (
        fill(line, '    ', ' \\').replace('\0', ' '), text)


def bash(found):
    """The text of completion.bash."""
    options, kinds = '', {}
    for program, rows in found.items():
        options += bash_case([program], '\n' + fill(
            ' '.join(row[0] for row in rows), ' ' * 12, ''))
        for option, argument, _ in rows:
            kind = WORDS.get(argument) or (
                argument if argument in ('FILE', 'DIR', '') else 'OTHER')
            kinds.setdefault(kind, []).append('%s %s' % (program, option))
    arguments = ''.join(bash_case(patterns, kind)
                        for kind, patterns in sorted(kinds.items()) if kind)
    return NOTE + BASH % (options, arguments, ' '.join(found))


# zsh.


def zsh_option(option, argument, text):
    """One specification of _arguments; see zshcompsys(1)."""
    spec = '*' + option
    if argument:
        spec += '=' if option.startswith('--') else '+'
    if text:
        spec += '[%s]' % text.replace('[', '\\[').replace(']', '\\]')
    if argument:
        action = {'FILE': '_files', 'DIR': '_files -/'}.get(argument, ' ')
        if argument in WORDS:
            action = '(%s)' % WORDS[argument].replace(':', '\\:')
        spec += ':%s:%s' % (argument.replace(':', '\\:'), action)
    return "'%s'" % spec.replace("'", "'\\''")


def zsh(found):
    """The text of _tarsnap."""
    text = '#compdef %s\n' % ' '.join(found) + NOTE + '\ncase $service in\n'
    for program, rows in found.items():
        text += "%s)\n    _arguments -s -S -A '-*' \\\n" % program
        text += ''.join('        %s \\\n' % zsh_option(*row) for row in rows)
        text += "        '*:file:_files' ;;\n"
    return text + 'esac\n'


def main():
    """Write both files."""
    found = programs()
    for name, text in (('completion.bash', bash(found)),
                       ('_tarsnap', zsh(found))):
        with open(os.path.join(HERE, name), 'w') as file:
            file.write(text)


if __name__ == '__main__':
    main()
