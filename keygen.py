#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-keygen and tarsnap-keymgmt: the tools that make key files.

A key file is all that stands between a backup and the world.  It is born
here, on the machine it is for, and no server ever sees a secret of it:

    create the file (0600, never over another)     nothing is lost if we die
         -> ask for the account's password         standard input
         -> connect; is this the server meant?     nothing was sent until here
         -> register the public halves             the password stays at home
         -> ask for a passphrase, write, fsync     or remove the file

tarsnap-keymgmt then cuts key files down to what a machine may do: one that
only writes, one that only prunes, one for the safe.  It needs no server.

Map of this file, bottom up:

    options             the words of a command line, by a table
    new key files       there from the start, gone if anything fails
    the server          whom to trust, and how to register
    tarsnap-keygen      a new machine
    tarsnap-keymgmt     subsets of keys, and what is in one
    programs            exit statuses and messages

The bytes of a key file are in tarsnap-format(5), the exchange with the server
in tarsnap-protocol(7).
"""

import hmac
import os
import re
import signal
import sys

import tarsnap
from tarsnap import (ROLE_DELETE, ROLE_NAME, ROLE_NUKE, ROLE_READ, ROLE_WRITE,
                     TRANSPORT_DIR, TRANSPORT_TLS, Error, Reader, RemoteError,
                     UserError, sha256)

##############################################################################
# Options
#
# Hand-written: the tools' contract is not argparse's.  Short flags bundle,
# long ones are never abbreviated, what may be said once is an error said
# twice, and a usage error exits 1.  Knows no meanings.
##############################################################################

FLAG, ONCE, MANY = 1, 2, 3      # no value; one; a list of values


class Usage(UserError):
    """The command line is wrong; a short usage follows the message."""


def options_parse(words, table):
    """({option: True, value or list}, operands) of a command line.

    `table` has FLAG, ONCE or MANY for each option, dashes included.  Options
    end at the first operand or at `--`.
    """
    found, words = {}, list(words)
    while words and len(words[0]) > 1 and words[0][0] == '-':
        word = words.pop(0)
        if word == '--':
            break
        if word.startswith('--'):
            option, equals, value = word.partition('=')
            option_take(found, table, option, value if equals else None,
                        words)
        else:
            for letter in word[1:]:
                option_take(found, table, '-' + letter, None, words)
    return found, words


def option_take(found, table, option, value, words):
    """Enter one option; its value is `value` or the next of `words`."""
    kind = table.get(option)
    if kind is None:
        raise Usage('Unknown option: %s' % option)
    if kind == FLAG:
        if value is not None:
            raise Usage('%s takes no value' % option)
        found[option] = True
        return
    if value is None:
        if not words:
            raise Usage('%s needs a value' % option)
        value = words.pop(0)
    if kind == MANY:
        found.setdefault(option, []).append(value)
    elif option in found:
        raise Usage('%s is given twice' % option)
    else:
        found[option] = value


def size_parse(text, option):
    """Bytes in a size like `200M` or `1 GB`: decimal powers."""
    try:
        return tarsnap.size_parse(text)
    except UserError:
        raise Usage('%s: not a size: %s' % (option, text)) from None


def seconds_parse(text, option):
    """The seconds of --passphrase-time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 86400:
        raise Usage('%s: not a number of seconds from 0.05 to 86400: %s'
                    % (option, text))
    return seconds


##############################################################################
# New key files
#
# Made before anything else happens, so that no registered key is ever lost for
# want of a place to write it.
##############################################################################

PROTECTION = {'--passphrased': FLAG, '--passphrase-mem': ONCE,
              '--passphrase-time': ONCE}
CONFIRM = 'Please confirm passphrase for keyfile %s: '


class Protection:
    """What a new key file is encrypted with, as the options say.

    `source` is the option that names a METHOD:ARG and implies --passphrased.
    """

    def __init__(self, options, source):
        self.method = options.get(source, 'dev:tty-stdin')
        self.wanted = '--passphrased' in options or source in options
        self.memory = None          # bytes at most; None for half of all
        self.seconds = 1.0          # what one guess shall cost
        for option in ('--passphrase-mem', '--passphrase-time'):
            if option in options and not self.wanted:
                raise Usage('%s needs --passphrased' % option)
        if '--passphrase-mem' in options:
            self.memory = size_parse(options['--passphrase-mem'],
                                     '--passphrase-mem')
        if '--passphrase-time' in options:
            self.seconds = seconds_parse(options['--passphrase-time'],
                                         '--passphrase-time')
        self.asks = tarsnap.ask_passphrase(self.method)
        self.secret = None
        if self.wanted and not self.method.startswith('dev:'):
            self.secret = self.ask('')      # fail before registering

    def ask(self, path):
        """The new passphrase (bytes), or None if there is to be none."""
        if not self.wanted or self.secret is not None:
            return self.secret
        while True:
            secret = self.asks(path)
            if not secret:
                raise UserError('The passphrase is empty')
            if self.method != 'dev:tty-stdin' or secret == \
                    tarsnap.passphrase_dev('tty-stdin', CONFIRM % path):
                return secret
            sys.stderr.write('Passphrases mismatch, please try again\n')


class NewKeyFile:
    """A key file being made; `with` removes it unless it was written."""

    def __init__(self, path):
        self.path = path
        self.fd = tarsnap.key_create(path)
        self.written = False

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if not self.written:
            os.unlink(self.path)

    def write(self, key, protection):
        """Ask for the passphrase, write; durable on return."""
        secret = protection.ask(self.path)
        tarsnap.key_write(self.fd, key, secret, protection.memory,
                          protection.seconds)
        tarsnap.fsync_dir(os.path.dirname(self.path) or '.')
        self.written = True


##############################################################################
# The server: whom to trust, and how to register
#
# Nothing leaves before the server's fingerprint is one that was given on the
# command line or said yes to on a terminal.  Even then the password does not
# leave: what does is good for this one registration (SCRAM, RFC 5802, over
# scrypt).
##############################################################################

PASSWORD_PROMPT = 'Enter tarsnap account password: '

# scrypt parameters a server may ask for.  Less would give whoever plays the
# server a cheap oracle of the password, more would stall the machine.
LOG_N_MIN, LOG_N_MAX, SCRYPT_R, SCRYPT_P = 14, 18, 8, 1


def pins_parse(words):
    """The 32-byte pins in the values of --fingerprint."""
    pins = []
    for word in words:
        if not re.fullmatch('[0-9a-fA-F]{64}', word):
            raise Usage('--fingerprint: not 64 hexadecimal digits: %s' % word)
        pins.append(bytes.fromhex(word))
    if len(pins) > 8:
        raise Usage('--fingerprint: a key file holds at most 8')
    return pins


def password_read():
    """The account's password: one line of standard input, as bytes."""
    if os.isatty(0):
        return tarsnap.passphrase_tty(os.dup(0), PASSWORD_PROMPT, 2)
    return tarsnap.line_read(0).rstrip(b'\r')


def server_trust(channel, statement, pins):
    """The pins of the key file, if this is the server that is meant.

    A directory or an ssh names the server by itself; of a host, without
    `pins`, the user is asked.
    """
    seen = statement.fingerprint()
    if pins:
        if seen not in pins:
            raise RemoteError(
                '%s is not the server meant: its fingerprint is %s; nothing '
                'was sent' % (channel.server, seen.hex()))
        return pins
    if channel.link.transport == TRANSPORT_TLS:
        fingerprint_ask(channel.server, seen.hex())
    return [seen]


def fingerprint_ask(server, shown):
    """Have the user compare fingerprints on the terminal, like ssh.

    Never on standard input, where the password is piped.
    """
    try:
        fd = os.open('/dev/tty', os.O_RDWR | os.O_NOCTTY)
    except OSError:
        raise UserError(
            '%s has the fingerprint %s; if that is the one its operator gave '
            'you, say --fingerprint %s; nothing was sent'
            % (server, shown, shown)) from None
    try:
        question = ('The server %s has the fingerprint\n%s\n'
                    'Is it the one its operator gave you (yes/no or the '
                    'fingerprint)? ' % (server, shown))
        while True:
            tarsnap.write_all(fd, question.encode())
            line = tarsnap.line_read(fd).decode('utf-8', 'replace')
            answer = line.strip().lower()
            if answer in ('yes', shown):
                return
            if answer in ('no', ''):
                raise UserError('The server is not trusted; nothing was sent')
            question = 'Please type yes, no or the fingerprint: '
    finally:
        os.close(fd)


def register(channel, key, user, password):
    """Make the public halves of `key` known; sets its number and store.

    The server answers the same machine number if asked again with the same
    keys.  An empty `user` has no password (directories and ssh).
    """
    user, name = user.encode(), key.name.encode()
    first = os.urandom(32) + bytes([len(user)]) + user
    reader = answer(channel, tarsnap.CHALLENGE, tarsnap.REGISTER1, first)
    salt = reader.take(32)
    log_n, r, p = reader.u8(), reader.u32(), reader.u32()
    reader.end()
    second = bytes([len(name)]) + name + b''.join(
        public for _, public in sorted(key.sign_pubs.items()))
    proof = bytes(32)
    if user:
        if not LOG_N_MIN <= log_n <= LOG_N_MAX or (r, p) != (SCRYPT_R,
                                                             SCRYPT_P):
            raise RemoteError('%s asks for scrypt parameters no honest '
                              'server uses (2^%d, %d, %d); the password was '
                              'not used' % (channel.server, log_n, r, p))
        derived = tarsnap.scrypt_derive(password, salt, log_n, r, p, 32)
        transcript = channel.wait_statement() + first + second
        proof = proof_make(derived, transcript)
    reader = answer(channel, tarsnap.REGISTERED, tarsnap.REGISTER2,
                    second + proof)
    key.machine, key.store = reader.u64(), reader.take(16)
    reader.end()


def proof_make(derived, transcript):
    """What shows that we know the password, in this exchange only."""
    client = hmac.digest(derived, b'client', 'sha256')
    mask = hmac.digest(sha256(client), transcript, 'sha256')
    return bytes(a ^ b for a, b in zip(client, mask))


def answer(channel, wanted, kind, body):
    """A Reader on the answer of type `wanted` to one request."""
    try:
        found, body = channel.call(kind, body)
    except tarsnap.Refused as e:
        if e.code == tarsnap.E_LOGIN:
            raise UserError('No user with that address exists, or the '
                            'password is incorrect') from None
        raise
    if found != wanted:
        raise RemoteError('%s answered registration with a frame of type %d'
                          % (channel.server, found))
    return Reader(body, 'answer of %s' % channel.server)


def store_make(path):
    """Make the store in directory `path`, where there is none yet."""
    try:
        import tarsnapd
    except ImportError:
        raise UserError('A directory as server needs tarsnapd.py beside '
                        'keygen.py') from None
    try:
        tarsnapd.open_local(path, create=True).close()
    except tarsnapd.ServerError as e:
        raise UserError(str(e)) from None


##############################################################################
# tarsnap-keygen
##############################################################################

KEYGEN_USAGE = """\
usage: tarsnap-keygen --keyfile FILE --machine NAME --server HOST:PORT
           --user EMAIL [--fingerprint HEX] [--passphrased]
           [--passphrase-mem SIZE] [--passphrase-time SECONDS]
           [--passphrase METHOD:ARG]
       tarsnap-keygen --keyfile FILE --machine NAME
           --server DIRECTORY | ssh://HOST/DIRECTORY [...]
       tarsnap-keygen --version | --help
"""

KEYGEN_OPTIONS = dict(PROTECTION, **{
    '--keyfile': ONCE, '--machine': ONCE, '--server': ONCE, '--user': ONCE,
    '--fingerprint': MANY, '--passphrase': ONCE, '--version': FLAG,
    '--help': FLAG})


def keygen(words):
    """Make a key file and register its machine."""
    options, operands = options_parse(words, KEYGEN_OPTIONS)
    if inform('tarsnap-keygen', KEYGEN_USAGE, options):
        return
    if operands:
        raise Usage('Not an option: %s' % operands[0])
    for option in ('--keyfile', '--machine', '--server'):
        if option not in options:
            raise Usage('%s is missing' % option)
    server, transport = server_parse(options['--server'])
    name = name_check('--machine', options['--machine'], True)
    user = ''
    if transport == TRANSPORT_TLS:
        if '--user' not in options:
            raise Usage('--user is missing')
        user = name_check('--user', options['--user'], False)
    pins = pins_parse(options.get('--fingerprint', ()))
    protection = Protection(options, '--passphrase')
    key = tarsnap.key_make(server, name)
    with NewKeyFile(options['--keyfile']) as file:
        password = password_read() if user else b''
        if transport == TRANSPORT_DIR:
            store_make(server)
        machine_make(key, user, password, pins)
        file.write(key, protection)
    if transport != TRANSPORT_TLS:
        complain('tarsnap-keygen', 'note: keys keep the backups in %s secret '
                 'and show any change, but whoever can write there can '
                 'destroy them' % server)


def server_parse(server):
    """A server's address as the key file holds it, and its transport."""
    transport = tarsnap.link_make(server).transport
    if transport == TRANSPORT_DIR:
        server = os.path.abspath(server)
    return server, transport


def name_check(option, name, ascii_only):
    """`name`, if it is one for a machine or a user: 1 to 255 bytes."""
    if not 1 <= len(os.fsencode(name)) <= 255:
        raise Usage('%s: not 1 to 255 bytes long' % option)
    if not name.isprintable() or ascii_only and not name.isascii():
        raise Usage('%s: only printable %scharacters may stand in it'
                    % (option, 'ASCII ' if ascii_only else ''))
    return name


def machine_make(key, user, password, pins):
    """Register `key` with its server; number, store and pins are set."""
    channel = tarsnap.Channel(key.server)
    try:
        statement = tarsnap.Statement(channel)
        key.pins = server_trust(channel, statement, pins)
        register(channel, key, user, password)
        if key.store != statement.store or not key.machine:
            raise RemoteError('%s registered the machine in another store '
                              'than its own' % key.server)
    finally:
        channel.close()


##############################################################################
# tarsnap-keymgmt
##############################################################################

KEYMGMT_USAGE = """\
usage: tarsnap-keymgmt --outkeyfile FILE [-rwd] [--prune] [--nuke]
           [--passphrased] [--passphrase-mem SIZE]
           [--passphrase-time SECONDS] [--new-passphrase METHOD:ARG]
           [--passphrase METHOD:ARG] [--force-resources] KEYFILE ...
       tarsnap-keymgmt --print-key-id | --print-key-permissions |
           --print-fingerprint KEYFILE
       tarsnap-keymgmt --version | --help
"""

# `-d` is what the original calls delete; --prune alone can neither read nor
# destroy everything.
KEYMGMT_ROLES = {'-r': {ROLE_READ}, '-w': {ROLE_WRITE},
                 '-d': {ROLE_READ, ROLE_DELETE, ROLE_NUKE},
                 '--prune': {ROLE_DELETE}, '--nuke': {ROLE_NUKE}}

KEYMGMT_OPTIONS = dict(PROTECTION, **{
    '--outkeyfile': ONCE, '-r': FLAG, '-w': FLAG, '-d': FLAG, '--prune': FLAG,
    '--nuke': FLAG, '--new-passphrase': ONCE, '--passphrase': ONCE,
    '--force-resources': FLAG, '--print-key-id': ONCE,
    '--print-key-permissions': ONCE, '--print-fingerprint': ONCE,
    '--version': FLAG, '--help': FLAG})


def keymgmt(words):
    """Write a key file with some of the roles of others, or describe one."""
    options, paths = options_parse(words, KEYMGMT_OPTIONS)
    if inform('tarsnap-keymgmt', KEYMGMT_USAGE, options):
        return
    ask = tarsnap.ask_passphrase(options.get('--passphrase', 'dev:tty-stdin'))
    force = '--force-resources' in options
    for option, about in PRINTERS.items():
        if option in options:
            if paths or set(options) - {option, '--passphrase',
                                        '--force-resources'}:
                raise Usage('%s stands alone' % option)
            key = tarsnap.key_load(options[option], ask, force)
            tarsnap.write_all(1, about(key).encode() + b'\n')
            return
    if '--outkeyfile' not in options:
        raise Usage('--outkeyfile is missing')
    if not paths:
        raise Usage('No key file to take keys from')
    protection = Protection(options, '--new-passphrase')
    roles = set().union(*(KEYMGMT_ROLES.get(option, ()) for option in options))
    with NewKeyFile(options['--outkeyfile']) as file:
        key = merge([tarsnap.key_load(path, ask, force) for path in paths],
                    roles)
        if not roles:
            complain('tarsnap-keymgmt', 'warning: %s will hold no key that '
                     'permits anything' % file.path)
        file.write(key, protection)


def merge(keys, roles):
    """One Key with `roles`, each from the first of `keys` that has it."""
    for key in keys[1:]:
        if (key.machine, key.store, key.public_hash()) != (
                keys[0].machine, keys[0].store, keys[0].public_hash()):
            raise UserError('%s and %s are keys of different machines'
                            % (keys[0].path, key.path))
    out = keys[0].subset(())
    for role in sorted(roles):
        for key in keys:
            if key.can(role):
                break
        else:
            raise UserError('The %s authorization is in none of the input '
                            'key files' % ROLE_NAME[role])
        out.sign_privs[role] = key.sign_privs[role]
        for field in tarsnap.ROLE_SECRETS[role]:
            setattr(out, field, getattr(key, field))
    return out


def permissions(key):
    """The sentence of --print-key-permissions; scripts look for its words."""
    can = {role for role in ROLE_NAME if key.can(role)}
    words = ['reading'] * (ROLE_READ in can)
    words += ['writing'] * (ROLE_WRITE in can)
    if KEYMGMT_ROLES['-d'] <= can:
        words.append('deleting')
    else:
        words += ['pruning'] * (ROLE_DELETE in can)
        words += ['nuking'] * (ROLE_NUKE in can)
    text = ' and '.join(words) or 'nothing'
    if len(words) > 2:
        text = '%s, and %s' % (', '.join(words[:-1]), words[-1])
    return 'This key has permissions for: %s.' % text


PRINTERS = {
    '--print-key-id': lambda key: '%d' % key.machine,
    '--print-key-permissions': permissions,
    '--print-fingerprint': lambda key: key.public_hash().hex(),
}


##############################################################################
# Programs
#
# 0 done, 1 with one line on standard error, 130 interrupted.
##############################################################################


def inform(program, usage, options):
    """Do what --version (to stderr, as the original's tools) or --help ask."""
    if '--version' in options:
        sys.stderr.write('%s %s\n' % (program, tarsnap.VERSION))
    elif '--help' in options:
        tarsnap.write_all(1, usage.encode())
    else:
        return False
    return True


def complain(program, text, usage=''):
    """One line on stderr, and perhaps the usage; never fails."""
    try:
        sys.stderr.write('%s: %s\n%s' % (program, text, usage))
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


def run(program, body, usage, words):
    """The exit status of `body` called with a command line's words."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            # Ended like ^C, so that a half-made key file is removed.
            signal.signal(number, signal.default_int_handler)
    try:
        import resource     # keys do not belong in a core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        body(sys.argv[1:] if words is None else words)
        return 0
    except Usage as e:
        complain(program, e, usage)
    except Error as e:
        complain(program, e)
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        complain(program, '%s: %s' % (e.filename or 'system call',
                                      e.strerror or e))
    except Exception as e:
        complain(program, 'internal error: %s: %s' % (type(e).__name__, e))
    return 1


def keygen_main(argv=None):
    """tarsnap-keygen; `argv` is without the program's name."""
    return run('tarsnap-keygen', keygen, KEYGEN_USAGE, argv)


def keymgmt_main(argv=None):
    """tarsnap-keymgmt; `argv` is without the program's name."""
    return run('tarsnap-keymgmt', keymgmt, KEYMGMT_USAGE, argv)


def main():
    """python3 keygen.py [keygen | keymgmt] ..."""
    words = sys.argv[1:]
    tools = {'keygen': keygen_main, 'keymgmt': keymgmt_main}
    if words and words[0] in tools:
        return tools[words[0]](words[1:])
    return keygen_main(words)


if __name__ == '__main__':
    sys.exit(main())
