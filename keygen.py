#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""tarsnap-keygen, -keyregen, -keymgmt and -recrypt: the tools for key files.

A key file is all that stands between a backup and the world.  It is born
here, on the machine it is for, and no server ever sees a secret of it:

    create the file (0600, never over another)     nothing is lost if we die
         -> ask for the account's password         standard input
         -> connect; is this the server meant?     nothing was sent until here
         -> register the public halves             the password stays at home
         -> ask for a passphrase, write, fsync     or remove the file

tarsnap-keymgmt then cuts key files down to what a machine may do: one that
only writes, one that only prunes, one for the safe.  It needs no server.

Where a key file got into wrong hands, tarsnap-keyregen makes one for a new
machine that gives equal content equal names, and tarsnap-recrypt moves all
archives over: sealed anew, read back, and only then deleted behind it.

Map of this file, bottom up:

    options             the words of a command line, by a table
    output              what the tools say
    new key files       there from the start, gone if anything fails
    the server          whom to trust, and how to register
    tarsnap-keygen      a new machine
    tarsnap-keyregen    a new machine in the place of an old one
    tarsnap-keymgmt     subsets of keys, and what is in one
    tarsnap-recrypt     archives of the old machine become the new one's
    programs            exit statuses and messages

The bytes of a key file are in tarsnap-format(5), the exchange with the server
in tarsnap-protocol(7).
"""

import functools
import hmac
import os
import re
import signal
import sys

import tarsnap
from tarsnap import (CHUNK, COMPLETE, PARTIAL, RECORD, ROLE_DELETE, ROLE_NAME,
                     ROLE_NUKE, ROLE_READ, ROLE_WRITE, TRANSPORT_DIR,
                     TRANSPORT_TLS, CorruptError, Error, Reader, Record,
                     RemoteError, UserError, sha256)

##############################################################################
# Options
#
# Hand-written: the tools' contract is not argparse's.  Short flags bundle,
# long ones are never abbreviated, what may be said once is an error said
# twice, and a usage error exits 1.  Knows no meanings.
##############################################################################

# No value, once; no value, again and again; one value; a list of values.
FLAG, AGAIN, ONCE, MANY = 1, 2, 3, 4


class Usage(UserError):
    """The command line is wrong; a short usage follows the message."""


def options_parse(words, table):
    """({option: True, value or list}, operands) of a command line.

    `table` has FLAG, AGAIN, ONCE or MANY for each option, dashes included.
    Options end at the first operand or at `--`.
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
    if kind in (FLAG, ONCE) and option in found:
        raise Usage('%s is given twice' % option)
    if kind in (FLAG, AGAIN):
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
    else:
        found[option] = value


def options_need(options, operands, needed):
    """Usage unless all of `needed` are there, and no operand is."""
    if operands:
        raise Usage('Not an option: %s' % operands[0])
    for option in needed:
        if option not in options:
            raise Usage('%s is missing' % option)


SECONDS_TEXT = re.compile(r'[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,3})?|[0-9]+\.')


def size_parse(text, option):
    """Bytes in a size like `200M` or `1 GB`: decimal powers."""
    try:
        return tarsnap.size_parse(text)
    except UserError:
        raise Usage('%s: not a size: %s' % (option, text)) from None


def seconds_parse(text, option):
    """The seconds of --passphrase-time."""
    seconds = float(text) if SECONDS_TEXT.fullmatch(text) else 0.0
    if not 0.05 <= seconds <= 86400:
        raise Usage('%s: not a number of seconds from 0.05 to 86400: %s'
                    % (option, text))
    return seconds


##############################################################################
# Output: what the tools say
#
# Facts and progress to standard output, everything else to standard error.
##############################################################################


def output(text):
    """Write `text` to standard output."""
    try:
        tarsnap.write_all(1, os.fsencode(text))
    except OSError as e:
        raise UserError('Cannot write to standard output: %s'
                        % e.strerror) from None


def inform(program, usage, options):
    """Do what --version (to stderr, as the original's tools) or --help ask."""
    if '--version' in options:
        tarsnap.write_all(2, b'%s %s\n' % (program.encode(),
                                           tarsnap.VERSION.encode()))
    elif '--help' in options:
        output(usage)
    else:
        return False
    return True


def complain(program, text, usage=''):
    """One line on stderr, and perhaps the usage; never fails."""
    tarsnap.note('%s: %s\n%s' % (program, tarsnap.one_line(str(text)), usage))


##############################################################################
# New key files
#
# Made before anything else happens, so that no registered key is ever lost for
# want of a place to write it.
##############################################################################

PROTECTION = {'--passphrased': FLAG, '--passphrase-mem': ONCE,
              '--passphrase-time': ONCE, '--new-passphrase': ONCE}
# How the passphrases of key files that exist are got.
OPENING = {'--passphrase': ONCE, '--force-resources': FLAG}
INFORMING = {'--version': FLAG, '--help': FLAG}
DEFAULT_METHOD = 'dev:tty-stdin'
CONFIRM = 'Please confirm passphrase for keyfile %s: '


class Protection:
    """What a new key file is encrypted with, as the options say."""

    def __init__(self, options):
        self.method = options.get('--new-passphrase', DEFAULT_METHOD)
        self.wanted = bool({'--passphrased', '--new-passphrase'}
                           & set(options))
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
            if self.method != DEFAULT_METHOD or secret == \
                    tarsnap.passphrase_dev('tty-stdin', CONFIRM % path):
                return secret
            tarsnap.write_all(2, b'Passphrases mismatch, please try again\n')


# After these a half-made key file is removed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NewKeyFile:
    """A key file that `with` makes, and removes unless it was written."""

    def __init__(self, path):
        self.path = path
        self.fd = None
        self.written = False

    def __enter__(self):
        try:
            # A signal right after it was made would leave it behind.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            try:
                self.fd = tarsnap.key_create(self.path)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except KeyboardInterrupt:
            if self.fd is not None:
                os.unlink(self.path)
            raise
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
# scrypt).  A connection that is lost is made again, as the client does.
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
    if sys.stdin is None:
        raise UserError('No standard input to read the account\'s password '
                        'from')
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
            tarsnap.write_all(fd, os.fsencode(question))
            line = tarsnap.line_read(fd).decode('utf-8', 'replace')
            answer = line.strip().lower()
            if answer in ('yes', shown):
                return
            if answer in ('no', ''):
                raise UserError('The server is not trusted; nothing was sent')
            question = 'Please type yes, no or the fingerprint: '
    finally:
        os.close(fd)


def register(channel, key, user, password, derive):
    """Make the public halves of `key` known; sets its number and store.

    The server answers the same machine number if asked again with the same
    keys.  An empty `user` has no password (directories and ssh).  `derive` is
    scrypt_derive().
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
        derived = derive(password, salt, log_n, r, p, 32)
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
        # Busy too: it says for how long, so that is no hitch of the network.
        raise RemoteError(str(e)) from None
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


def server_parse(server):
    """A server's address as the key file holds it, and its transport."""
    transport = tarsnap.link_make(server).transport
    if transport == TRANSPORT_DIR:
        server = os.path.abspath(server)
    return server, transport


def name_check(option, name, ascii_only):
    """`name`, if it is one for a machine or a user: 1 to 255 bytes, in UTF-8
    whatever the locale.
    """
    if not 1 <= len(os.fsencode(name)) <= 255:
        raise Usage('%s: not 1 to 255 bytes long' % option)
    name = os.fsencode(name).decode('utf-8', 'surrogateescape')
    if not name.isprintable() or ascii_only and not name.isascii():
        raise Usage('%s: only printable %scharacters may stand in it'
                    % (option, 'ASCII ' if ascii_only else ''))
    return name


class Registry(tarsnap.Remote):
    """The server that `key` is to be registered with.

    connect() does it, over as many connections as Remote would try: a server
    gives each ten seconds, and less in a flood of others.
    """

    def __init__(self, key, user, password, pins):
        super().__init__(key, ())
        self.user = user
        self.password = password        # bytes
        self.pins = pins                # [] until the user has agreed
        # Slow, and the same each time: on a busy machine a new connection
        # each time would not live to see the end of it.
        self.derive = functools.lru_cache(1)(tarsnap.scrypt_derive)

    def connect_once(self):
        """One try; sets the key's number, store and pins."""
        self.close()
        key, channel = self.key, tarsnap.Channel(self.server)
        try:
            statement = tarsnap.Statement(channel)
            key.pins = self.pins = server_trust(channel, statement, self.pins)
            self.reached = True
            register(channel, key, self.user, self.password, self.derive)
            if key.store != statement.store or not key.machine:
                raise RemoteError('%s registered the machine in another store '
                                  'than its own' % self.server)
        except BaseException:
            channel.close()
            raise
        self.channel = channel
        return channel


def machine_make(key, transport, user, password, pins):
    """Register `key` with its server; number, store and pins are set."""
    if transport == TRANSPORT_DIR:
        store_make(key.server)
    registry = Registry(key, user, password, pins)
    try:
        registry.connect()
    finally:
        registry.close()


def destruction_note(program, server, transport):
    """What a server that is only a directory cannot protect from."""
    if transport != TRANSPORT_TLS:
        complain(program, 'note: keys keep the backups in %s secret and show '
                 'any change, but whoever can write there can destroy them'
                 % server)


##############################################################################
# tarsnap-keygen
##############################################################################

KEYGEN_USAGE = """\
usage: tarsnap-keygen --keyfile FILE --machine NAME --server HOST:PORT
           --user EMAIL [--fingerprint HEX] [--passphrased]
           [--passphrase-mem SIZE] [--passphrase-time SECONDS]
           [--new-passphrase METHOD:ARG]
       tarsnap-keygen --keyfile FILE --machine NAME
           --server DIRECTORY | ssh://HOST/DIRECTORY [...]
       tarsnap-keygen --version | --help
"""

MACHINE = dict(PROTECTION, **{
    '--keyfile': ONCE, '--machine': ONCE, '--server': ONCE, '--user': ONCE,
    '--fingerprint': MANY})
KEYGEN_OPTIONS = dict(MACHINE, **{'--passphrase': ONCE}, **INFORMING)


def keygen(words):
    """Make a key file and register its machine."""
    options, operands = options_parse(words, KEYGEN_OPTIONS)
    if inform('tarsnap-keygen', KEYGEN_USAGE, options):
        return
    options_need(options, operands, ('--keyfile', '--machine', '--server'))
    server, transport = server_parse(options['--server'])
    name = name_check('--machine', options['--machine'], True)
    user = ''
    if transport == TRANSPORT_TLS:
        if '--user' not in options:
            raise Usage('--user is missing')
        user = name_check('--user', options['--user'], False)
    pins = pins_parse(options.get('--fingerprint', ()))
    if '--passphrase' in options:       # there is no other it could be of
        if '--new-passphrase' in options:
            raise Usage('--passphrase and --new-passphrase are one here')
        options['--new-passphrase'] = options['--passphrase']
    protection = Protection(options)
    key = tarsnap.key_make(server, name)
    with NewKeyFile(options['--keyfile']) as file:
        password = password_read() if user else b''
        machine_make(key, transport, user, password, pins)
        file.write(key, protection)
    destruction_note('tarsnap-keygen', server, transport)


##############################################################################
# tarsnap-keyregen
#
# The new machine has secrets of its own but for those that names are made
# with: so every block keeps its name, and tarsnap-recrypt has to seal anew
# what is stored and nothing else.  Who has the old key file can therefore
# still tell whether a piece of content is stored, but can read none of it.
##############################################################################

KEYREGEN_USAGE = """\
usage: tarsnap-keyregen --keyfile FILE --oldkey FILE --machine NAME
           [--user EMAIL] [--server ADDRESS] [--fingerprint HEX]
           [--passphrased] [--passphrase-mem SIZE]
           [--passphrase-time SECONDS] [--new-passphrase METHOD:ARG]
           [--passphrase METHOD:ARG] [--force-resources]
       tarsnap-keyregen --version | --help
"""

KEYREGEN_OPTIONS = dict(MACHINE, **{'--oldkey': ONCE}, **OPENING, **INFORMING)


def keyregen(words):
    """Make the key file of a machine that is to take an old one's place."""
    options, operands = options_parse(words, KEYREGEN_OPTIONS)
    if inform('tarsnap-keyregen', KEYREGEN_USAGE, options):
        return
    options_need(options, operands, ('--keyfile', '--oldkey', '--machine'))
    server = transport = None           # as the old key says
    if '--server' in options:
        server, transport = server_parse(options['--server'])
    name = name_check('--machine', options['--machine'], True)
    user = ''
    if '--user' in options and transport in (None, TRANSPORT_TLS):
        user = name_check('--user', options['--user'], False)
    pins = pins_parse(options.get('--fingerprint', ()))
    protection = Protection(options)
    ask = tarsnap.ask_passphrase(options.get('--passphrase', DEFAULT_METHOD))
    with NewKeyFile(options['--keyfile']) as file:
        password = password_read() if user else b''
        old = tarsnap.key_load(options['--oldkey'], ask,
                               '--force-resources' in options)
        old.need(ROLE_WRITE, 'tarsnap-keyregen')
        if server is None:
            server, transport = server_parse(old.server)
        if transport != TRANSPORT_TLS:
            user = ''
        elif not user:
            raise Usage('--user is missing')
        if server == old.server:
            pins = pins or old.pins
        key = key_regen(old, server, name)
        machine_make(key, transport, user, password, pins)
        file.write(key, protection)
    destruction_note('tarsnap-keyregen', server, transport)


NAMING_SECRETS = 'k_data', 'k_refs', 'k_cut'


def key_regen(old, server, name):
    """A new key that names blocks as `old` does and says whose heir it is."""
    key = tarsnap.key_make(server, name)
    for field in NAMING_SECRETS:
        setattr(key, field, getattr(old, field))
    key.parent = old.public_hash()
    return key


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
    '--outkeyfile': ONCE, '-r': AGAIN, '-w': AGAIN, '-d': AGAIN,
    '--prune': AGAIN, '--nuke': AGAIN, '--print-key-id': ONCE,
    '--print-key-permissions': ONCE, '--print-fingerprint': ONCE},
    **OPENING, **INFORMING)


def keymgmt(words):
    """Write a key file with some of the roles of others, or describe one."""
    options, paths = options_parse(words, KEYMGMT_OPTIONS)
    if inform('tarsnap-keymgmt', KEYMGMT_USAGE, options):
        return
    ask = tarsnap.ask_passphrase(options.get('--passphrase', DEFAULT_METHOD))
    force = '--force-resources' in options
    for option, about in PRINTERS.items():
        if option in options:
            if paths or set(options) - {option, *OPENING}:
                raise Usage('%s stands alone' % option)
            key = tarsnap.key_load(options[option], ask, force)
            output(about(key) + '\n')
            return
    if '--outkeyfile' not in options:
        raise Usage('--outkeyfile is missing')
    if not paths:
        raise Usage('No key file to take keys from')
    protection = Protection(options)
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
# tarsnap-recrypt
#
# An archive's blocks are fetched from the old machine, compared with their
# names, sealed for the new one and stored there under the same names, below a
# record of the new machine's; one archive, one commit.  Then all that the new
# machine has is read back, and only then the old machine's history gets its
# last commit, which deletes everything if nobody has added to it meanwhile.
# Stopped anywhere, it goes on from there when run again.
##############################################################################

RECRYPT_USAGE = """\
usage: tarsnap-recrypt --oldkey FILE --oldcachedir DIR --newkey FILE
           --newcachedir DIR [--passphrase METHOD:ARG]
           [--new-passphrase METHOD:ARG] [--force-resources]
       tarsnap-recrypt --version | --help
"""

RECRYPT_OPTIONS = dict({
    '--oldkey': ONCE, '--oldcachedir': ONCE, '--newkey': ONCE,
    '--newcachedir': ONCE, '--new-passphrase': ONCE}, **OPENING, **INFORMING)


def recrypt(words):
    """Move all archives of a machine to the one of a keyregen'ed key."""
    options, operands = options_parse(words, RECRYPT_OPTIONS)
    if inform('tarsnap-recrypt', RECRYPT_USAGE, options):
        return
    options_need(options, operands, ('--oldkey', '--oldcachedir', '--newkey',
                                     '--newcachedir'))
    method = options.get('--passphrase', DEFAULT_METHOD)
    asks = [tarsnap.ask_passphrase(method), tarsnap.ask_passphrase(
        options.get('--new-passphrase', method))]
    force = '--force-resources' in options
    old = tarsnap.key_load(options['--oldkey'], asks[0], force)
    new = tarsnap.key_load(options['--newkey'], asks[1], force)
    recrypt_check(old, new)
    cachedirs_check(options['--oldcachedir'], options['--newcachedir'])
    source = Side(old, options['--oldcachedir'])
    target = Side(new, options['--newcachedir'])
    try:
        source.open()
        target.open()
        while not move(source, target):
            step('The old machine has changed meanwhile')
    finally:
        target.close()
        source.close()


def recrypt_check(old, new):
    """UserError unless `new` is heir to `old`, and both may do what it takes.

    Were the keys of two machines that have nothing to do with each other,
    no block would keep its name.
    """
    if new.parent != old.public_hash() or any(
            getattr(old, field) != getattr(new, field)
            for field in NAMING_SECRETS
            if getattr(old, field) and getattr(new, field)):
        raise UserError('%s was not made from %s by tarsnap-keyregen; nothing '
                        'was moved' % (new.path, old.path))
    for key, role in ((old, ROLE_READ), (old, ROLE_NUKE), (new, ROLE_READ),
                      (new, ROLE_WRITE)):
        key.need(role, 'tarsnap-recrypt')


def cachedirs_check(old, new):
    """The old cache directory is there, and the new one is another."""
    if not os.path.isdir(old):
        raise UserError('There is no cache directory %s; tarsnap --fsck with '
                        'the old key makes it' % old)
    if os.path.realpath(old) == os.path.realpath(new):
        raise UserError('The old key and the new one need a cache directory '
                        'each, not both %s' % old)


def step(text):
    """Say on standard output what is done next."""
    output(text + '\n')


class Dots:
    """A sign of life on standard output for each thousand blocks."""

    EACH = 1000

    def __init__(self):
        self.blocks = 0

    def block(self):
        self.blocks += 1
        if not self.blocks % self.EACH:
            output('.')

    def end(self):
        if self.blocks >= self.EACH:
            output('\n')


class Side:
    """One of the two machines, with its cache directory."""

    def __init__(self, key, cachedir):
        self.opt = tarsnap.Settings()
        self.opt.key, self.opt.cachedir = key, cachedir
        self.key = key
        self.remote = tarsnap.Remote(key, [role for role in ROLE_NAME
                                           if key.can(role)])
        self.cache = None

    def open(self):
        """Lock the cache directory, which is made if it is missing."""
        tarsnap.cachedir_make(self.opt.cachedir)
        self.cache = tarsnap.cache_open(self.opt)

    def refresh(self):
        """Bring the cache up to the head that a new session shows."""
        self.remote.close()
        tarsnap.cache_begin(self.opt, self.cache, self.remote)
        if self.cache.partial:
            raise tarsnap.inconsistent()

    def base(self):
        return self.cache.n, self.cache.head

    def archives(self):
        """{archive id: (Record, state)} of all archives at base(), as the
        server shows and the history signed them.
        """
        def bad(error):
            raise error
        live = None
        while live is None or self.remote.head != self.base():
            self.refresh()
            live = tarsnap.history_live(self.remote, self.opt)
        return {archive: (record, live[archive][2]) for archive, record in
                tarsnap.archive_records(self.remote, live, bad)}

    def close(self):
        self.remote.close()
        if self.cache:
            self.cache.close()


def move(source, target):
    """Copy, verify, delete; False if the old machine was not left alone."""
    step('Reading the archives of both machines')
    wanted = source.archives()
    base = source.base()
    if not wanted:
        step('The old machine has no archives; there is nothing to move')
        return True
    have = copies(wanted, target.archives())
    todo = sorted((wanted[archive] for archive in set(wanted) - have),
                  key=lambda row: (row[0].created, row[0].title))
    for number, (record, state) in enumerate(todo, 1):
        step('Copying archive [%d/%d] %s' % (number, len(todo),
                                             tarsnap.show(record.title)))
        archive_copy(source, target, record, state)
    step('Verifying what the new machine has')
    verify(target, wanted)
    memo_copy(source, target)
    step('Deleting the archives of the old machine')
    deleted = tarsnap.nuke_commit(source.remote, base)
    source.refresh()
    if deleted:
        step('Moved %s to the new machine' % tarsnap.plural(
            len(wanted), 'archive'))
    return deleted


def memo_copy(source, target):
    """Let the next backup with the new key know which files have not changed:
    their pages are called what they were.
    """
    import sqlite3
    old, new = (tarsnap.Memo(side.opt.cachedir) for side in (source, target))
    try:
        old.db.backup(new.db)
    except sqlite3.Error:
        pass                    # it is safe to lose
    finally:
        old.close()
        new.close()


def facts(record, state):
    """What an archive and its copy have in common: all but the machine, the
    signature, and the place in the history.
    """
    return (record.archive, record.series, record.complete, record.sorted,
            record.level, record.entries, record.pages, record.bytes,
            record.title, record.created, record.argv, record.host,
            [kid.pack() for kid in record.kids], state == COMPLETE)


def copies(wanted, have):
    """The ids of the archives `have`; UserError if one of them is no copy of
    one that is `wanted`.
    """
    for archive, row in have.items():
        if archive not in wanted or facts(*row) != facts(*wanted[archive]):
            raise UserError(
                'The new machine has an archive that is not a copy of one of '
                'the old machine\'s: %s; nothing was deleted'
                % tarsnap.show(row[0].title))
    return set(have)


class Resealer(tarsnap.Fetcher):
    """Fetches blocks of one machine; a slot gets (content, the block sealed
    for another machine).
    """

    def __init__(self, remote, sealer):
        super().__init__(remote)
        self.sealer = sealer

    def decode(self, kid, body):
        """Compare with the name, then seal what is inside as it is framed:
        it is not deflated again, and has its old length.
        """
        content = super().decode(kid, body)
        return content, self.sealer.encrypt(
            kid.cls, kid.name, tarsnap.block_decrypt(
                kid.cls, kid.name, body[32:], self.key.machine,
                self.opener.secret))


def archive_copy(source, target, record, state):
    """Make the copy of one archive; committed on return."""
    txn = tarsnap.Transaction(target.remote, target.cache, [record.archive])
    sealer = tarsnap.Sealer(target.key)
    try:
        txn.begin()
        while True:
            try:
                blocks_copy(source, txn, sealer, record)
                txn.commit(lambda base: record_copy(txn, sealer, record, base),
                           COMPLETE if state == COMPLETE else PARTIAL)
                return
            except tarsnap.Restart:
                txn.again()
    finally:
        txn.pending.close()


def blocks_copy(source, txn, sealer, record):
    """Put all that is below `record` and not stored yet."""
    fetcher, dots = Resealer(source.remote, sealer), Dots()
    jobs = ((kid, False, kid) for kid in
            blocks_missing(source.cache, txn, record.kids))
    try:
        for slot, kid in fetcher.ahead(jobs):
            block_put(txn, kid, *slot.get())
            dots.block()
    finally:
        fetcher.close()
    dots.end()


def blocks_missing(cache, txn, kids):
    """The Kids at and below `kids` to be copied, each once, and each after
    those it names.  What is stored, is with everything below it.
    """
    seen = set()
    stack = [(kid, False) for kid in reversed(kids)]
    while stack:
        kid, expanded = stack.pop()
        if expanded:
            yield kid
        elif kid.name not in seen:
            seen.add(kid.name)
            if txn.cache.find(kid.name):
                txn.borrow(kid.name)
                continue
            stack.append((kid, True))
            stack += [(below, False) for below in
                      reversed(cache.kids(kid.name) or ())]


def block_put(txn, kid, content, sealed):
    """Put one block; those it names are put or stored."""
    if txn.claim(kid.name, kid.cls, kid.plain) is not None:
        return
    if kid.cls == CHUNK:
        txn.put(kid.name, CHUNK, sealed, kid.plain)
        return
    if content.kind == tarsnap.PAGE:
        for small in tarsnap.page_smalls(content):
            txn.add_small(*small)
    index_put(txn, kid.name, kid.cls, sealed, kid.plain, content.kids)


def index_put(txn, name, cls, sealed, plain, kids):
    """Put a claimed index block or record, with what is below it summed."""
    sums = txn.below(kids)
    txn.put(name, cls, sealed, plain, kids,
            (plain + sums[0], len(sealed) + sums[1]))


def record_copy(txn, sealer, record, base):
    """Put a record of the new machine that says what `record` says."""
    copy = Record()
    for field in ('archive', 'series', 'complete', 'sorted', 'level',
                  'entries', 'pages', 'bytes', 'kids', 'title', 'created',
                  'argv', 'host'):
        setattr(copy, field, getattr(record, field))
    copy.machine = txn.key.machine
    copy.lineage, copy.tid, copy.base = txn.lineage, txn.tid, base
    parts = tarsnap.record_pack(copy, txn.key)
    copy.name = tarsnap.Names(txn.key).record(parts[0])
    sealed = sealer.seal(RECORD, copy.name, parts)
    sealer.check(RECORD, copy.name, parts, sealed)
    txn.claim(copy.name, RECORD, tarsnap.record_plain(parts))
    index_put(txn, copy.name, RECORD, sealed, tarsnap.record_plain(parts),
              copy.kids)
    return copy


def verify(target, wanted):
    """Read from the server every block that the new machine has, each once.

    Names are keyed hashes of content, so that equal records and readable
    blocks are equal archives.  Raises an Error if one is missing or differs.
    """
    if copies(wanted, target.archives()) != set(wanted):
        raise CorruptError('The new machine lacks archives that were copied '
                           'to it; nothing was deleted')
    seen = set()
    level = [kid for record, _ in wanted.values() for kid in record.kids]
    fetcher, dots = tarsnap.Fetcher(target.remote), Dots()
    try:
        while level:
            level = verify_level(fetcher, level, seen, dots)
    finally:
        fetcher.close()
    dots.end()


def verify_level(fetcher, kids, seen, dots):
    """Read the blocks in `kids` that are not in `seen`; those they name."""
    def jobs():
        for kid in kids:
            if kid.name not in seen:
                seen.add(kid.name)
                yield kid, False, None
    below = []
    for slot, _ in fetcher.ahead(jobs()):
        content = slot.get()
        dots.block()
        if slot.kid.cls != CHUNK:
            below += content.kids
    return below


##############################################################################
# Programs
#
# 0 done, 1 with one line on standard error, 130 interrupted.
##############################################################################


def run(program, body, usage, words):
    """The exit status of `body` called with a command line's words."""
    before, tarsnap.warn.program = tarsnap.warn.program, program
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        tarsnap.streams_fill()
        if sys.stderr is sys.__stderr__:
            # Names as they came in, whatever PYTHONIOENCODING says.
            sys.stderr.reconfigure(encoding=sys.getfilesystemencoding(),
                                   errors=sys.getfilesystemencodeerrors())
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
        if type(e).__module__ == 'sqlite3':     # imported only where needed
            complain(program, 'Error in a cache directory: %s; if it is '
                     'damaged, run tarsnap --fsck with its key' % e)
            return 1
        complain(program, 'internal error: %s: %s' % (type(e).__name__, e))
    finally:
        tarsnap.warn.program = before
    return 1


def keygen_main(argv=None):
    """tarsnap-keygen; `argv` is without the program's name."""
    return run('tarsnap-keygen', keygen, KEYGEN_USAGE, argv)


def keyregen_main(argv=None):
    """tarsnap-keyregen; `argv` is without the program's name."""
    return run('tarsnap-keyregen', keyregen, KEYREGEN_USAGE, argv)


def keymgmt_main(argv=None):
    """tarsnap-keymgmt; `argv` is without the program's name."""
    return run('tarsnap-keymgmt', keymgmt, KEYMGMT_USAGE, argv)


def recrypt_main(argv=None):
    """tarsnap-recrypt; `argv` is without the program's name."""
    return run('tarsnap-recrypt', recrypt, RECRYPT_USAGE, argv)


def main():
    """python3 keygen.py [keygen | keyregen | keymgmt | recrypt] ..."""
    words = sys.argv[1:]
    tools = {'keygen': keygen_main, 'keyregen': keyregen_main,
             'keymgmt': keymgmt_main, 'recrypt': recrypt_main}
    if words and words[0] in tools:
        return tools[words[0]](words[1:])
    return keygen_main(words)


if __name__ == '__main__':
    sys.exit(main())
