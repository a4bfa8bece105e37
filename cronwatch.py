#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""cronwatch: reads the mails of cron, so that nobody else has to.

It learns for each job what its mails usually say, and raises what is not as
usual: a new kind of line, a line that is missing, a number out of its range,
a mail at the wrong time, a mail that did not come.  Nothing is configured and
nothing leaves the machine but the alarms.

    a mail, or the output of a command      bytes
         -> Mail: whose is it, what does it say          job, lines
         -> Miner: lines become kinds of lines           key, values
         -> Judge: the run beside the runs before it     one finding, or none
         -> State: learned and kept, in one transaction  SQLite
         -> Alarms: mail, SMS, call, until answered

A mail is never lost and never bounced by a fault of ours: what cannot be read,
judged or kept is passed on as it came.

Map of this file, bottom up:

    Errors          what can be wrong, by what the reader can do
    Configuration   one file of lines `name value`
    Mail            bytes to job and lines
    Masks           what varies within a line: numbers, times, paths, ...
    Miner           lines to kinds of lines
    State           the one file that everything is kept in
    Judge           what is usual, and what is not
    Alarms          who is told, how, and until when: what is kept,
                    configuration, texts, ways out, escalation, answers
    Watch           a mail from arrival to alarm; feedback
    Reports         what it believes, and why
    Delivery        whatever happens, the mail is not lost
    Commands        the command line
"""

import contextlib
import os
import re
import sys
import time

VERSION = '1.1.0'

##############################################################################
# Errors
#
# Classed by what the reader can do.  Anything else that is raised is a fault
# of this program; deliver then passes the mail on as it came.
##############################################################################


class Error(Exception):
    """The command or the configuration is wrong: exit status 2."""


##############################################################################
# Configuration
#
# A file of lines `name value`; lines that begin with # are comments.  Each
# section below that can be configured has a table of its own: name -> (parse,
# default), where a list as default makes the name repeatable.
##############################################################################


def conf_read(path, tables):
    """{name: value} of the file at `path` (which need not exist).

    `tables` are dicts of name -> (parse, default); parse takes the text after
    the name and raises ValueError.  Error names file and line.
    """
    known = {}
    for table in tables:
        known.update(table)
    values = {name: list(default) if isinstance(default, list) else default
              for name, (_, default) in known.items()}
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read()
    except FileNotFoundError:
        return values
    except (OSError, UnicodeDecodeError) as e:
        raise Error('%s: %s' % (path, e))
    for number, line in enumerate(text.splitlines(), 1):
        name, _, value = line.strip().partition(' ')
        if not name or name.startswith('#'):
            continue
        if name not in known:
            raise Error('%s:%d: unknown option %s' % (path, number, name))
        try:
            parsed = known[name][0](value.strip())
        except ValueError as e:
            raise Error('%s:%d: %s: %s' % (path, number, name, e))
        if isinstance(known[name][1], list):
            values[name].append(parsed)
        else:
            values[name] = parsed
    return values


##############################################################################
# Mail
#
# From bytes to the name of a job and lines of text.  Any bytes whatever give
# a result, in bounded memory and time.  Knows nothing of what was before.
##############################################################################

# What is read of a mail; of a longer one, only the length is known.
HEAD_BYTES = 1 << 20
# Lines that are looked at: the first and the last ones of a long mail.
LINES_FIRST, LINES_LAST = 4000, 1000
LINE_CHARS = 1000
HEADER_CHARS = 4000     # of each header, also of a part's
PARTS = 100             # of a multipart mail
# Encodings of mails whose decoders take a time that grows with the square.
SLOW_CHARSETS = ('punycode', 'idna')
# What would command the terminal of whoever looks, or turn text around: C0
# but the tab, DEL, C1, ends of lines, and changes of direction.
UNSEEN = {code: ' ' for codes in (
    range(9), range(10, 32), range(127, 160), range(0x2028, 0x202f),
    range(0x2066, 0x206a)) for code in codes}


class Run:
    """One run of a job: what a mail says, or a command that was wrapped."""

    __slots__ = ('key', 'name', 'at', 'lines', 'count', 'size', 'status',
                 'seconds')

    def __init__(self, key, name, at, lines, count, size, status=None,
                 seconds=None):
        self.key = key          # of the job, the same for all its runs
        self.name = name        # of the job, as people know it
        self.at = at            # epoch, when it came
        self.lines = lines      # [(number from 1, text)], without empty ones
        self.count = count      # lines of the mail, all of them
        self.size = size        # bytes of the mail, all of them
        self.status = status    # exit status, or None if not known
        self.seconds = seconds  # how long it took, or None


class Intake:
    """All bytes of a stream: the beginning in memory, a long one on disk."""

    def __init__(self, stream):
        """Read `stream` to its end.  OSError where there is no room."""
        self.head = b''
        self.size = 0
        self.beyond = 0         # line ends behind head
        self.spill = None       # a file with all of it, where head is not all
        parts = []
        while self.size < HEAD_BYTES:
            block = stream.read(HEAD_BYTES)
            if not block:
                self.head = b''.join(parts)
                return
            parts.append(block)
            self.size += len(block)
        import tempfile
        whole = b''.join(parts)
        self.head = whole[:HEAD_BYTES]
        self.beyond = whole.count(b'\n', HEAD_BYTES)
        self.spill = tempfile.TemporaryFile()
        while whole:
            self.spill.write(whole)
            whole = stream.read(1 << 18)
            self.size += len(whole)
            self.beyond += whole.count(b'\n')

    def blocks(self):
        """All of it again, block by block."""
        if self.spill is None:
            yield self.head
            return
        self.spill.seek(0)
        while True:
            block = self.spill.read(1 << 18)
            if not block:
                return
            yield block


def text_lines(text, beyond=0):
    """(lines, count) as in Run of decoded text.

    Colours are dropped, and of a line that overwrote itself (progress) what
    was left in the end is kept.
    """
    if '\x1b' in text:
        text = re.sub(r'\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*\x07?|.)',
                      '', text)
    # A lone surrogate cannot be kept in SQLite.
    text = text.encode('utf-8', 'replace').decode('utf-8')
    found = text.replace('\r\n', '\n').split('\n')
    while found and not found[-1].strip():
        found.pop()
    # What was cut off begins in the middle of a line.
    count = len(found) + max(0, beyond - (not text.endswith('\n')))
    numbered = enumerate(found, 1)
    if len(found) > LINES_FIRST + LINES_LAST:
        numbered = list(numbered)
        numbered[LINES_FIRST:-LINES_LAST] = []
    lines = []
    for number, line in numbered:
        line = line.rstrip()
        if '\r' in line:
            line = line[line.rindex('\r') + 1:]
        line = line[:LINE_CHARS].translate(UNSEEN)
        if line.strip():
            lines.append((number, line))
    return lines, count


def html_text(text):
    """What a reader sees of HTML, roughly: a line for each block."""
    import html
    # Nothing here looks from each of many places at all that follows: what
    # has no end goes to the end of the text, or to where another one begins.
    text = re.sub(r'(?is)<(script|style|head)\b.*?(</\1\s*>|\Z)'
                  r'|<!--.*?(-->|\Z)', ' ', text)
    text = re.sub(r'\s+', ' ', text)
    text = re.sub(r'(?i)</t[dh]\s*>', ' ', text)
    text = re.sub(r'(?i)<(br|hr|/?p|/?div|/?tr|/?li|/?h\d|/?table|/?pre)\b'
                  r'[^<>]*>', '\n', text)
    text = re.sub(r'<[^<>]*>', '', text)
    text = html.unescape(re.sub(r'&#[xX]?[0-9A-Fa-f]{9,};?', '?', text))
    return '\n'.join(line for line in map(str.strip, text.split('\n'))
                     if line)


def header_text(value):
    """A header's value as one line of text, whatever is in it."""
    if value is None:
        return ''
    text = str(value)
    if '=?' in text:
        from email.header import decode_header
        pieces = []
        try:
            for piece, charset in decode_header(text):
                if isinstance(piece, bytes):
                    piece = decoded(piece, charset)
                pieces.append(piece)
            text = ''.join(pieces)
        except ValueError:      # binascii.Error, HeaderParseError
            pass
    text = text.encode('utf-8', 'replace').decode('utf-8')
    return ' '.join(text.translate(UNSEEN).split())


def decoded(data, charset):
    """Bytes as text: by their charset if it is one, and never an error."""
    charset = (charset or 'us-ascii').lower()
    if charset in SLOW_CHARSETS:
        charset = 'us-ascii'
    if charset in ('us-ascii', 'ascii', 'utf-8', 'utf8', 'unknown-8bit'):
        try:
            return data.decode('utf-8')
        except UnicodeDecodeError:
            charset = 'utf-8' if charset.startswith('utf') else 'latin-1'
    try:
        return data.decode(charset, 'replace')
    except (LookupError, UnicodeError, ValueError):
        return data.decode('latin-1')


def part_text(part):
    """The text of one part that is no multipart."""
    try:
        data = part.get_payload(decode=True)
    except (ValueError, LookupError):
        data = None
    if data is None:
        data = str(part.get_payload()).encode('utf-8', 'replace')
    text = decoded(data, part.get_param('charset') if isinstance(
        part.get_param('charset'), str) else None)
    if part.get_content_type() == 'text/html':
        return html_text(text)
    return text


def message_text(message, left=None):
    """The text of a mail: of alternatives the plain one, attachments named.

    `left` is a list with the number of parts that may still be looked at.
    """
    left = [PARTS] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        return ''
    kind = message.get_content_type()
    if not message.is_multipart():
        name = header_text(message.get_filename())
        if name or not kind.startswith('text/'):
            return '[attachment: %s %s]' % (kind, name)
        return part_text(message)
    parts = message.get_payload()
    if kind == 'multipart/alternative':
        for wanted in ('text/plain', None):
            for part in parts:
                if wanted in (None, part.get_content_type()):
                    text = message_text(part, left)
                    if text.strip():
                        return text
        return ''
    return '\n'.join(message_text(part, left) for part in parts)


def varying_masked(text):
    """Of a subject or command, what is the same each time."""
    text = re.sub(r'(?i)\b(mon|tues?|wed(nes)?|thu(rs)?|fri|sat(ur)?|sun)'
                  r'(day)?\b', '#', text)
    text = re.sub(r'(?i)\b(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?'
                  r'|july?|aug(ust)?|sep(t(ember)?)?|oct(ober)?'
                  r'|nov(ember)?|dec(ember)?)\b', '#', text)
    text = re.sub(r'(?i)\b(?=[0-9a-f-]*\d)[0-9a-f]{8}[0-9a-f-]*\b', '#', text)
    text = re.sub(r'\d+([.:,/-]\d+)*', '#', text)
    text = re.sub(r'(?i)\b(ok|success(ful(ly)?)?|succeeded|completed?|fail'
                  r'(ed|ure)?|errors?|warnings?|critical|problems?)\b', '#',
                  text)
    return re.sub(r'#([ ,]*#)+', '#', text)


def name_host(message):
    """The host that a mail is from, as its sender says."""
    sender = header_text(message.get('From'))
    host = sender.rpartition('@')[2].split('>')[0].split()
    return host[0].lower() if host else ''


def job_name(message, lines):
    """(key, name, exit status or None) of the job that sent a mail.

    Cron's subjects (Vixie cron and its kin: Debian, FreeBSD, cronie) name
    user, host and command; Debian's adds (failed).  anacron names its job.
    What a systemd unit reported begins with a line of systemctl status.  Any
    other mail is known by sender and subject.
    """
    subject = re.sub(r'(?i)^(re|fwd?):\s*', '',
                     header_text(message.get('Subject')))
    found = re.match(r'Cron <([^@>]*)@([^>]*)> (.*)$', subject)
    if found:
        user, host, command = found.groups()
        failed = command.endswith(' (failed)')
        if failed:
            command = command[:-9]
        return (' '.join(('cron', user, host, varying_masked(command))),
                '%s@%s: %s' % (user, host, command), 1 if failed else None)
    found = re.match(r"Anacron job '([^']*)' on (\S+)", subject)
    if found:
        return ('anacron %s %s' % found.groups(),
                'anacron@%s: %s' % (found[2], found[1]), None)
    host = name_host(message)
    for _, line in lines[:3]:
        found = re.match(
            r'[^\w\s]?\s*(\S+\.(?:service|timer|mount|path|socket))'
            r'(?: - |$)', line)
        if found:
            text = '\n'.join(line for _, line in lines[:40])
            status = re.search(r'code=\w+, status=(\d+)', text)
            return ('unit %s %s' % (host, found[1]),
                    '%s: %s' % (host, found[1]),
                    int(status[1]) if status else None)
    sender = header_text(message.get('From'))
    found = re.search(r'[^\s<>"]+@[^\s<>"]+', sender)
    sender = (found[0] if found else sender).lower()
    return ('mail %s %s' % (sender, varying_masked(subject)),
            '%s: %s' % (sender, subject or '(no subject)'), None)


def mail_parse(raw):
    """The email.message.Message of bytes, whatever they are."""
    from email import parser
    from email.policy import Compat32

    class Short(Compat32):
        """Cuts headers: what looks for their parameters and words takes a
        time that grows with the square of their length.
        """

        def header_source_parse(self, sourcelines):
            name, value = super().header_source_parse(sourcelines)
            return name, value[:HEADER_CHARS]

    # A parser looks at each line for the end of each part it is in.
    if len(re.findall(br'(?im)^content-type:\s*multipart/', raw)) <= PARTS:
        try:
            return parser.BytesParser(policy=Short()).parsebytes(raw)
        except RecursionError:  # parts in parts in parts
            pass
    message = parser.BytesHeaderParser(policy=Short()).parsebytes(raw)
    for name in ('Content-Type', 'Content-Transfer-Encoding'):
        del message[name]       # then it is plain text
    return message


def mail_read(raw, at):
    """The Run that the mail `raw`, or its beginning, tells of."""
    return mail_run(mail_parse(raw[:HEAD_BYTES]), at, len(raw),
                    raw.count(b'\n', HEAD_BYTES))


def mail_date(message):
    """Epoch of a mail's Date, or None."""
    from email.utils import mktime_tz, parsedate_tz
    try:
        when = parsedate_tz(header_text(message.get('Date')))
        return float(mktime_tz(when)) if when else None
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def mail_run(message, at, size, beyond=0):
    """The Run that a mail tells of.

    `size` and `beyond` are the bytes of all of it and the line ends that
    were not read.
    """
    lines, count = text_lines(message_text(message), beyond)
    key, name, status = job_name(message, lines)
    if key.startswith('mail '):         # the subject says something, too
        lines.insert(0, (0, 'Subject: ' + header_text(
            message.get('Subject'))[:LINE_CHARS]))
    return Run(key[:500], name[:200], at, lines, count, size, status)


##############################################################################
# Masks
#
# What varies within a line: a line becomes a list of tokens, in which what
# people would call a value is VARIABLE, and the values beside it.  One
# configuration for everything.  Knows nothing of jobs and of other lines.
#
# The types of values, by the letter that begins their slot: number (n), size
# in bytes (b), duration in seconds (d), share in percent (c); path (p),
# address or host (a), URL (u), mail address (m), quoted text (q), name with
# digits (e), word (w).  Times, ids and versions are masked and give no value:
# they are new each time and say nothing.
##############################################################################

VARIABLE = '<*>'        # a value by its looks
ANYTHING = '<**>'       # a place where many words were seen
UNITS = {'': 1, 'k': 1e3, 'm': 1e6, 'g': 1e9, 't': 1e12, 'p': 1e15}
SPANS = {'u': 1e-6, 'n': 1e-9, 's': 1., 'm': 60., 'h': 3600., 'd': 86400.,
         'w': 604800.}
# Words before what looks like a time of day and is a duration.
LASTED = {'in', 'took', 'after', 'for', 'elapsed', 'duration', 'lifetime'}
# Instead of a value, where there is none.
NOTHING = {'null', 'none', 'nil', 'n/a', 'na', '-', '--', '<none>', '(null)'}

# In order: the first that fits at a place is taken.
MASKS = (
    ('u', r'[A-Za-z][A-Za-z0-9+.-]*://[^\s"\'<>()\[\]{}|,;]+'),
    ('m', r'[\w.+-]+@[\w-]+(?:\.[\w-]+)+'),
    ('i', r'\{?\b[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}\b\}?'),
    # Fri Jun 17 07:07:00 CEST 2005; Dec 10 06:55:46; 17 Jun 2005; 2016/9/27
    ('t', r'(?:\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]{0,6},? +)?'
          r'(?:\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}'
          r'\.? +\d{1,2}\b|\b\d{1,2}[. /-]+(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|'
          r'Sep|Oct|Nov|Dec)[a-z]{0,6}\b\.?)(?:[ ,/-]+\d{4}\b)?'
          r'(?:[,:]? *\d{1,2}:\d\d(?::\d\d)?(?:[.,]\d+)?)?'
          r'(?: +(?:[A-Z]{3,4}|[+-]\d{4})\b)?(?: +\d{4}\b)?'),
    ('t', r'\b(?:\d{4}[-/.:_]\d{1,2}[-/.:_]\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]'
          r'\d{2,4}(?![.\d]))(?:[T :_,-]+\d{1,2}[:.h]?\d\d(?:[:.]?\d\d)?'
          r'(?:[.,:]\d+)?)?(?: ?(?:Z|UTC|GMT|CES?T|[+-]\d\d:?\d\d))?(?![\w])'),
    ('t', r'\b\d{8}[-_T]\d{2}:?\d{2}(?::?\d{2}(?:[:.,]\d+)?)?Z?\b'),
    ('a', r'(?<![\w.:])(?:[0-9A-Fa-f]{2}[:-]){5,19}[0-9A-Fa-f]{2}(?![\w:])'),
    ('a', r'(?<![\w.:])(?:(?:[0-9A-Fa-f]{1,4}:){4,7}[0-9A-Fa-f]{1,4}|'
          r'(?:[0-9A-Fa-f]{1,4}:)+:(?:[0-9A-Fa-f]{1,4}:)*[0-9A-Fa-f]{1,4}|'
          r'::1?)(?:/\d+|%\w+)?(?![\w:])'),
    ('a', r'/?(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?:[:#]\d+|/\d{1,2})?'
          r'(?:, ?\d{1,3}(?:\.\d{1,3}){3})*(?![\w.]\w)'),
    ('a', r'(?<![\w.@/-])[A-Za-z0-9][\w-]*(?:\.[\w-]+)+:\d{1,5}\b(?!:)'),
    ('t', r'(?<![\w.:])\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?: ?[AP]M)?(?![\w:])'),
    ('d', r'(?<![\w.:])\d+:\d\d(?::\d\d)?(?:\.\d+)?(?![\w:])'),
    ('p', r'(?<![\w/.:@-])~?(?:/[^\s/:,;()\[\]{}"\'`<>|=?]+)+/?'
          r'(?:\?[^\s"\'<>]*)?|(?<![^\s"\'(\[])/(?=[\s"\':)\]]|$)'
          r'|\b[A-Za-z]:\\[^\s,;"\']*|\\\\\S+'),
    ('i', r'@?\b0[xX][0-9A-Fa-f]+\b|@[0-9a-f]{5,16}\b'),
    # bus:slot:function and the like; Name{4711}
    ('e', r'(?<![\w.:])(?=[\w-]*\d)[\w-]+(?::(?=\w*\d)\w+){2,}(?![\w:])'
          r'|\b[A-Za-z]\w*\{[\w.:]*\d[\w.:]*\}'),
    ('q', r'(?<==)"[^"]*"|(?<==)\'[^\']*\''),
    # Java's names of classes, with a line of the source, from five parts on.
    ('i', r'\b(?:[A-Za-z_]\w*\.){4,}[\w$]+(?::\d+)?(?: (?=(?:\w+\.){4}))?'),
    ('b', r'(?<![\w.,])\d[\d,]*(?:\.\d+)? ?(?:[kKMGTP]i?B(?:ytes)?|[kKMGTP]iB|'
          r'[Bb]ytes?|B|[kKMGTP](?=\b))(?!\w)(?: \(\d[\d.,]* ?[kKMGTP]i?B'
          r'\))?'),
    ('c', r'(?<![\w.,])[-+]?\d+(?:\.\d+)? ?%'),
    ('d', r'(?<![\w.,:])<?\d[\d,]*(?:\.\d+)?(?: (?:[mun]?secs?|(?:milli|micro|'
          r'nano)?seconds?|min(?:ute)?s?|hours?|days?|ms|us)\b|(?:[mun]?s|'
          r'secs?|min|m|h|d)(?![\w%]))(?:,? ?\d+(?:\.\d+)?(?: (?:min(?:ute)?'
          r's?|sec(?:ond)?s?)\b|(?:ms|s|m|min)(?!\w)))*'),
    ('v', r'(?<![\w.])v?\d+(?:\.\d+){2,}[\w.+:~-]*|(?<![\w.])\d+(?::\d+)?\.\d+'
          r'(?:\.\d+)*[-+~][\w.+:~-]*\d\w*'),
    ('n', r'(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?'
          r'(?:[eE][-+]\d+)?(?![\w]|[.#~@-]\w|##)'),
    ('.', r'\.{3,}(?=[-+]?\w)'),        # a leader, before a value
    ('_', r'(?!@)(?:(?!\.{3})[^\s=:,;()\[\]{}"\'`|<>!])+'),
    ('-', r'[^\s]'),
)

TOPS = ('com org net edu gov mil int info biz io local lan internal intern '
        'home arpa test invalid example localdomain corp').split()


class Masker:
    """Splits lines; made once, since its pattern takes 10 ms to compile."""

    def __init__(self):
        self.scan = re.compile('|'.join(
            '(?P<%s>%s)' % ('x%d' % i, mask)
            for i, (_, mask) in enumerate(MASKS))).finditer
        self.letters = [letter for letter, _ in MASKS]
        self.digits = re.compile(
            r'-?\d+(?:[._-]?(?:[a-z][._-])?[.,]?\d+)*').sub
        self.random = re.compile(
            r'(?=[^\d]*\d)(?:[0-9a-f]{5,}|[0-9A-F]{8,})$|[0-9a-fA-F]{32,}$|'
            r'(?=[A-Za-z0-9]{8,}$)[A-Za-z]*(?:\d+[A-Za-z]+\d+[A-Za-z]|'
            r'\d+[A-Za-z]+\d+$(?<=\d{4}))').match
        self.number = re.compile(r'[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]\d+)?'
                                 ).search
        self.host = re.compile(
            r'(?=.*[A-Za-z])[\w-]+(?:\.[\w-]+)+\.?$').match
        self.unit = re.compile(r'(\d+(?:\.\d+)?) ?([A-Za-z]*)').findall

    def split(self, line):
        """(tokens, values, gaps): values are {place: (letter, text)}, gaps
        the places before which there was space.

        Of a name with digits the token has # for them; its value is the
        name.
        """
        tokens, values, gaps = [], {}, set()
        before, last = '', ''       # text, and letter if it was masked
        for match in self.scan(line):
            text, at = match.group(), match.start()
            if self.empty(before, text, line, at):
                values[len(tokens)] = 'w', ''
                tokens.append(VARIABLE)
            letter, token = self.token(match, before, tokens, line)
            # What may come any number of times stands for all of them.
            if token is VARIABLE and letter == last and letter in 'iap' \
                    and tokens[-1] is VARIABLE:
                continue
            if letter:
                values[len(tokens)] = letter, text
            if not at or line[at - 1].isspace():
                gaps.add(len(tokens))
            tokens.append(token)
            before, last = text, letter if token is VARIABLE else ''
        if self.empty(before, '', line, len(line)):
            values[len(tokens)] = 'w', ''
            tokens.append(VARIABLE)
        return tokens, values, gaps

    def token(self, match, before, tokens, line):
        """(letter or '', token) of one match."""
        letter, text = self.letters[match.lastindex - 1], match.group()
        if letter == '_':
            return self.word(text, tokens, line, match.end())
        if letter == '.':
            return '', '...'
        if letter == '-':
            return '', text
        if letter == 'e':
            return letter, self.digits('#', text)
        if letter == 't' and before.lower() in LASTED and len(text) < 9:
            return 'd', VARIABLE
        return letter, VARIABLE

    @staticmethod
    def empty(before, text, line, at):
        """Whether something usual is left out between `before` and `text`
        at `at`: ` ()`, `key= `, `user  from`.
        """
        if before == '(':
            place = line.rfind('(', 0, at)
            return text == ')' and (place < 1 or line[place - 1].isspace())
        if before == '=':
            place = line.rfind('=', 0, at)
            return place > 0 and line[place - 1].isalnum() and (
                not text or line[at - 1].isspace())
        return before == 'user' and text in ('from', 'by')

    def word(self, text, tokens, line, end):
        """(letter, token) of a word."""
        previous = tokens[-1] if tokens else ''
        if previous in ('user', 'for') and text[0].isalnum() and (
                previous != 'for' or line[end:end + 6] == ' from '):
            return 'w', VARIABLE
        if text.lower() in NOTHING and previous in ('=', ':'):
            return '', text
        if '.' in text and self.host(text) and self.is_host(
                text, previous == '='):
            return 'a', VARIABLE
        if not any(c.isdigit() for c in text):
            if '/' in text and text.count('.') > 1:
                return 'p', VARIABLE
            return '', text
        if self.random(text):
            return 'i', VARIABLE
        if '/' in text and (text.count('.') > 1 or text.count('/') > 1):
            return 'p', VARIABLE
        if '~' in text:
            return 'i', VARIABLE
        token = self.digits('#', text)
        return ('i', VARIABLE) if token == '#' else ('e', token)

    @staticmethod
    def is_host(text, value=False):
        """Whether a dotted name is of a host; in doubt what stands behind
        a `=` is, if `value`.
        """
        labels = text.rstrip('.').lower().split('.')
        if labels[0] in TOPS:           # com.example.Name is no host
            return False
        if labels[-1] in TOPS:
            return True
        if value and len(labels[-1]) < 5:
            return labels[-1].isalpha()
        return len(labels) > 2 and len(labels[-1]) == 2 and (
            labels[-2] in TOPS or labels[-2] in ('co', 'ac')
            or labels[0] in ('www', 'mail', 'ns', 'ftp', 'smtp', 'mx')
            or any(c.isdigit() or c == '-' for c in text))

    def value(self, letter, text):
        """What stood there: a float, a text, or None for what says nothing.
        """
        if letter in 'nc':
            match = self.number(text)
            return float(match.group().replace(',', ''))
        if letter == 'b':
            match = self.number(text)
            unit = text[match.end():].split('(')[0].strip().lower()
            scale = UNITS.get(unit[:1], 1)
            if unit[1:2] == 'i':
                scale = 1024 ** 'kmgtp'.find(unit[0]) * 1024
            return float(match.group().replace(',', '')) * scale
        if letter == 'd':
            return self.seconds(text)
        return text if letter in 'pauqmew' else None

    def seconds(self, text):
        """Seconds of `1:02:03`, `3 min 4.5 sec`, `<1 sec`, `12ms`."""
        if ':' in text:
            total = 0.
            for part in text.split(':'):
                total = total * 60 + float(part)
            return total
        total = 0.
        for number, unit in self.unit(text.replace(',', '')):
            small = unit[:2] in ('ms', 'us', 'ns') or unit[:5] in (
                'milli', 'micro', 'nanos')
            scale = SPANS.get(unit[:1], 1.)
            if small and unit[0] == 'm':
                scale = 1e-6 if unit.startswith('mic') else 1e-3
            total += float(number) * scale
        return total


##############################################################################
# Miner
#
# Lines to kinds of lines, one miner for each job.  A kind has a key that
# stays its own for good, whatever is learned later: the Judge's memory hangs
# on it.  Must be cheap to load and small: it is loaded for each mail.
#
# Lines with the same tokens are of one kind.  Two kinds become one when what
# tells them apart is seen to be a value: names with digits that changed on
# both sides, a value beside `null`, or so many different words in one place,
# the rest alike, that it must be anything.  How many depends on what stands
# there: `started`, `paused`, `resumed` and `stopped` are four events, while
# the fifth user who logs in is one more user.  The older kind's key stays;
# `merged` says which keys are no more.
##############################################################################

ENOUGH_NAMES = 3        # a.b.c
ENOUGH_SET = 4          # after `=`, or names with digits
ENOUGH_WORDS = 5
ENOUGH_STATES = 8       # words all in capitals, or where little else stands
KINDS_MOST = 2000       # of a job; then lines that fit none are of one kind
REST = '~'              # the key of that
LINE_MOST = 2000        # characters of a line that are looked at


class Miner:
    """The kinds of lines of one job.

    add(line) -> (key, values): the kind of the line, learned if it is new.
    `key` is a short str.  `values` has what stood in the variable parts, by
    slot: {slot: float} for numbers (sizes in bytes, durations in seconds,
    percents as they stand), {slot: str} for texts (path, host, name, ...).
    A slot is a short str that stays the same for the kind, whatever is
    learned later; it begins with the letter of the type (see Masks).
    find(line) -> the same, or None where add would make a new kind.
    template(key) -> the kind as people read it, variable parts as <*>.
    merged: {key that is no more: key it became one with}, all there ever
    were; same(key) follows it.
    times: what stood in the last line added for times of day and dates.
    dumps() -> str, and Miner(state) of that str is as it was.
    """

    masker = None           # one for all

    def __init__(self, state=None):
        self.kinds = {}     # key -> tokens
        self.gaps = {}      # key -> places of tokens after a space
        self.steady = {}    # key -> {place: name with digits, so far one}
        self.merged = {}
        self.made = 0       # keys, ever
        self.times = []     # of day, and dates, in the last line added
        if state:
            import json
            kinds, self.steady, self.merged, self.made = json.loads(state)
            self.steady = {key: {int(place): name for place, name in
                                 places.items()}
                           for key, places in self.steady.items()}
            for key, text in kinds.items():
                tokens = text.split('\t')
                self.kinds[key] = [token.lstrip(' ') for token in tokens]
                self.gaps[key] = {place for place, token in enumerate(tokens)
                                  if token[0] == ' '}
        self.exact = {}     # tokens as tuple -> key, all without words learned
        self.sizes = {}     # number of tokens -> [key, ...]
        for key, tokens in self.kinds.items():
            self.enter(key, tokens)

    def dumps(self):
        import json
        return json.dumps([
            {key: '\t'.join(' ' * (place in self.gaps[key]) + token
                            for place, token in enumerate(tokens))
             for key, tokens in self.kinds.items()},
            self.steady, self.merged, self.made], separators=(',', ':'),
            ensure_ascii=False)

    def enter(self, key, tokens):
        self.exact[tuple(tokens)] = key
        self.sizes.setdefault(len(tokens), []).append(key)

    def same(self, key):
        while key in self.merged:
            key = self.merged[key]
        return key

    def template(self, key):
        """The kind as people read it; KeyError if there never was one."""
        key = self.same(key)
        if key == REST:
            return VARIABLE
        return ''.join(
            ' ' * (i > 0 and i in self.gaps[key])
            + (VARIABLE if token == ANYTHING else token)
            for i, token in enumerate(self.kinds[key]))

    def look(self, line):
        """(what split gives, key or None) of a line."""
        if Miner.masker is None:
            Miner.masker = Masker()
        parts = self.masker.split(line[:LINE_MOST])
        tokens = parts[0]
        key = self.exact.get(tuple(tokens))
        if key is None:
            for other in self.sizes.get(len(tokens), ()):
                if all(a == b or a == ANYTHING for a, b in
                       zip(self.kinds[other], tokens)):
                    key = other
                    break
        return parts, key

    def told(self, key, tokens, values):
        """{slot: value} of a line of that kind."""
        out = {}
        learned = self.kinds[key] if key else tokens
        for place, (letter, text) in values.items():
            value = self.masker.value(letter, text)
            if value is not None:
                out['%s%d' % (letter, place)] = value
        if learned != tokens:
            for place, token in enumerate(tokens):
                if token != learned[place] and place not in values:
                    out['w%d' % place] = token
        return out

    def find(self, line):
        (tokens, values, _), key = self.look(line)
        return None if key is None else (key, self.told(key, tokens, values))

    def add(self, line):
        (tokens, values, gaps), key = self.look(line)
        self.times = [text for letter, text in values.values()
                      if letter == 't']
        if key is None:
            if len(self.kinds) >= KINDS_MOST:
                return REST, {}
            key = self.new(tokens, values, gaps)
        elif key in self.steady:
            key = self.changed(key, values)
        return key, self.told(key, tokens, values)

    def new(self, tokens, values, gaps):
        """Make a kind; the key it has, which may be that of an older one."""
        key = '%x' % self.made
        self.made += 1
        self.kinds[key], self.gaps[key] = tokens, gaps
        names = {place: text for place, (letter, text) in values.items()
                 if letter == 'e'}
        if names:
            self.steady[key] = names
        self.enter(key, tokens)
        return self.settle(key)

    def settle(self, key):
        """Make one of this kind and those that differ in a word that may be
        anything; the key it has then.
        """
        places = {}
        for other, (place,) in self.near(key, 1):
            places.setdefault(place, [key]).append(other)
        for place, keys in places.items():
            if self.any_word(place, keys):
                return self.settle(self.unite(keys, [place]))
        return key

    def changed(self, key, values):
        """Note which names with digits are not always the same."""
        steady = self.steady[key]
        moved = [place for place, name in steady.items()
                 if place in values and values[place][1] != name]
        for place in moved:
            del steady[place]
        if not steady:
            del self.steady[key]
        if moved:
            for other, places in self.near(key, 3):
                if all(self.moves(key, place) and self.moves(other, place)
                       for place in places):
                    return self.settle(self.unite([key, other], places))
        return key

    def moves(self, key, place):
        """Whether there is a name with digits that was not always the same.
        """
        return '#' in self.kinds[key][place] \
            and place not in self.steady.get(key, ())

    def near(self, key, most):
        """Yield (other key, places) of kinds that differ in 1 to `most`."""
        tokens = self.kinds[key]
        for other in list(self.sizes.get(len(tokens), ())):
            if other == key:
                continue
            places = []
            for place, (a, b) in enumerate(zip(tokens, self.kinds[other])):
                if a != b:
                    places.append(place)
                    if len(places) > most:
                        break
            else:
                if places:
                    yield other, places

    def any_word(self, place, keys):
        """Whether what stands at `place` in these kinds may be anything."""
        tokens = self.kinds[keys[0]]
        words = {self.kinds[key][place] for key in keys}
        if any(word == VARIABLE or '#' in word for word in words) and any(
                word.lower() in NOTHING for word in words):
            return True
        names = [word for word in words if word != VARIABLE]
        if len(names) < len(words) and all(
                word.count('.') > 1 for word in names):
            return True
        if not all(word[0].isalnum() or word[0] in '_/.*+-' or word == VARIABLE
                   for word in words):
            return False
        if words <= {'true', 'false', 'yes', 'no', 'on', 'off'}:
            return False
        rest = sum(1 for i, token in enumerate(tokens) if i != place
                   and len(token) > 1 and token[0].isalpha())
        if not rest and (place == 0 and len(tokens) < 2
                         or VARIABLE not in tokens):
            return False
        if all(word.count('.') > 1 for word in words):
            enough = ENOUGH_NAMES
        elif place and tokens[place - 1] == '=' or all(
                word.count('.') > 1 or '#' in word for word in words):
            enough = ENOUGH_SET
        elif all(word.isupper() for word in words) or rest < 2:
            enough = ENOUGH_STATES
        else:
            enough = ENOUGH_WORDS if place else len(self.kinds) + 2
        return len(words) >= enough

    def unite(self, keys, places):
        """Make one kind of several that differ at `places`; its key."""
        keys = sorted(keys, key=lambda key: int(key, 16))
        first = keys[0]
        tokens = list(self.kinds[first])
        for place in places:
            tokens[place] = ANYTHING
        for key in self.sizes[len(tokens)]:     # and what it now covers
            if key not in keys and all(
                    a == b or a == ANYTHING
                    for a, b in zip(tokens, self.kinds[key])):
                keys.append(key)
        first = min(keys, key=lambda key: int(key, 16))
        steady = self.steady.get(first, {})
        for key in keys:
            self.exact.pop(tuple(self.kinds[key]), None)
            self.sizes[len(tokens)].remove(key)
            own = self.steady.pop(key, {})
            steady = {place: name for place, name in steady.items()
                      if own.get(place) == name and place not in places}
            if key != first:
                del self.kinds[key], self.gaps[key]
                self.merged[key] = first
        if steady:
            self.steady[first] = steady
        self.kinds[first] = tokens
        self.enter(first, tokens)
        return first


##############################################################################
# State
#
# The one SQLite file.  All that belongs together changes in one transaction,
# so that a kill leaves the time before or the time after.  Each section that
# keeps something says so in a SCHEMA of its own.
##############################################################################

STATE_VERSION = 1
STATE_SCHEMA = '''
CREATE TABLE IF NOT EXISTS job(
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    runs INTEGER NOT NULL,
    seen REAL NOT NULL,     -- when its last mail came
    due REAL,               -- when check misses the next one, if ever
    usual REAL,             -- the interval that is usual then
    miner BLOB NOT NULL,    -- zlib of Miner.dumps()
    memory BLOB NOT NULL);  -- zlib of JSON of a Memory
CREATE INDEX IF NOT EXISTS job_due ON job(due) WHERE due IS NOT NULL;
CREATE TABLE IF NOT EXISTS finding(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    severity TEXT NOT NULL,
    reason TEXT NOT NULL,
    also TEXT NOT NULL,     -- JSON: [further reasons]
    lines TEXT NOT NULL,    -- JSON: [[number or null, text], ...]
    causes TEXT NOT NULL,   -- JSON: {cause: [[run, what was held], ...]}
    token TEXT NOT NULL,    -- unguessable, a reply must know it
    ended REAL);            -- recovered, or told to be normal
CREATE INDEX IF NOT EXISTS finding_job ON finding(job);
CREATE INDEX IF NOT EXISTS finding_at ON finding(at);
CREATE TABLE IF NOT EXISTS mail(
    id INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
    at REAL NOT NULL,
    finding INTEGER,        -- that it led to
    lines BLOB NOT NULL);   -- zlib of JSON: [[number, text], ...]
CREATE INDEX IF NOT EXISTS mail_job ON mail(job, at);
CREATE TABLE IF NOT EXISTS fact(
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL);
'''

MAILS = 4               # that are kept of each job
MAILS_RAISED = 8        # and of those that led to a finding
MAIL_LINES = 600        # of each
# Jobs known by sender and subject, which anybody may write, that came so
# seldom and raised nothing: more than these are forgotten, the oldest first.
SELDOM, SELDOM_MOST = 3, 1000


class Change:
    """A transaction that writes; rolled back if left by an exception."""

    def __init__(self, db):
        self.db = db

    def __enter__(self):
        self.db.execute('BEGIN IMMEDIATE')

    def __exit__(self, kind, *_):
        self.db.execute('ROLLBACK' if kind else 'COMMIT')


def packed(value):
    """A text or what JSON can hold, small."""
    import json
    import zlib
    if not isinstance(value, str):
        value = json.dumps(value, separators=(',', ':'))
    return zlib.compress(value.encode(), 1)


def unpacked(blob):
    import zlib
    return zlib.decompress(blob).decode()


class State:
    """The file; `db` is its connection, in autocommit.

    Use `with state.change():` for what belongs together: it waits for other
    processes, and what is done in it is durable when it is left.
    """

    def __init__(self, path):
        import sqlite3
        self.path = path
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.execute('PRAGMA foreign_keys = ON')
        version = self.db.execute('PRAGMA user_version').fetchone()[0]
        if not version:
            self.db.executescript(
                'BEGIN IMMEDIATE;' + STATE_SCHEMA + ALARM_SCHEMA
                + 'PRAGMA user_version = %d; COMMIT;' % STATE_VERSION)
        elif version != STATE_VERSION:
            raise Error('%s was made by another version of cronwatch' % path)

    def change(self):
        return Change(self.db)

    def close(self):
        self.db.close()

    def fact(self, name, default=None):
        """Something small that is kept, a str."""
        row = self.db.execute('SELECT value FROM fact WHERE name = ?',
                              (name,)).fetchone()
        return default if row is None else row[0]

    def fact_set(self, name, value):
        self.db.execute('INSERT OR REPLACE INTO fact VALUES (?, ?)',
                        (name, str(value)))

    def job(self, key):
        return self.db.execute('SELECT * FROM job WHERE key = ?',
                               (key,)).fetchone()

    def jobs_named(self, words):
        """Rows of the jobs whose id is `words` or whose name has it."""
        if words.isdigit():
            rows = self.db.execute('SELECT * FROM job WHERE id = ?',
                                   (int(words),)).fetchall()
            if rows:
                return rows
        return [row for row in self.db.execute(
            'SELECT * FROM job ORDER BY name')
            if words.lower() in row['name'].lower()]

    def job_keep(self, row, run, memory, miner, now):
        """Keep what is known of a job; the id of its row."""
        due = next_due(memory) or (None, None)
        values = (run.name, memory.n, run.at, due[0], due[1],
                  packed(miner.dumps()), packed(memory.dump()))
        if row is not None:
            self.db.execute(
                'UPDATE job SET name = ?, runs = ?, seen = ?, due = ?,'
                ' usual = ?, miner = ?, memory = ? WHERE id = ?',
                values + (row['id'],))
            return row['id']
        number = self.db.execute(
            'INSERT INTO job(name, runs, seen, due, usual, miner, memory,'
            ' key) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
            values + (run.key,)).lastrowid
        self.db.execute(
            "DELETE FROM job WHERE id IN (SELECT id FROM job WHERE runs < ?"
            " AND key LIKE 'mail %' AND id != ? AND id NOT IN (SELECT job"
            ' FROM finding) ORDER BY seen DESC LIMIT -1 OFFSET ?)',
            (SELDOM, number, SELDOM_MOST))
        return number

    def memory(self, row):
        """(Memory, Miner) of a job's row; new ones for None."""
        if row is None:
            return Memory(), Miner()
        import json
        return (Memory(json.loads(unpacked(row['memory']))),
                Miner(unpacked(row['miner'])))

    def memory_keep(self, number, memory):
        self.db.execute('UPDATE job SET memory = ? WHERE id = ?',
                        (packed(memory.dump()), number))

    def finding(self, number):
        """The Finding of that number; Error if there is none."""
        return Finding.of(self.finding_row(number))

    def finding_row(self, number):
        row = self.db.execute(
            'SELECT finding.*, job.name FROM finding JOIN job'
            ' ON job.id = finding.job WHERE finding.id = ?',
            (number,)).fetchone()
        if row is None:
            raise Error('there is no finding %s' % number)
        return row

    def finding_add(self, job, at, evidence, ended=None):
        """Keep a finding of the list `evidence`, the heaviest first."""
        import json
        first = evidence[0]
        lines, seen = [], set()
        for one in evidence:
            for line in one.lines:
                if tuple(line) not in seen and len(lines) < 50:
                    seen.add(tuple(line))
                    lines.append(line)
        also = []
        for one in evidence[1:]:
            if one.reason not in also + [first.reason]:
                also.append(one.reason)
        number = self.db.execute(
            'INSERT INTO finding(job, at, kind, severity, reason, also,'
            ' lines, causes, token, ended) VALUES (?,?,?,?,?,?,?,?,?,?)',
            (job, at, first.kind, first.severity, first.reason,
             json.dumps(also[:20]), json.dumps(lines),
             json.dumps({one.cause: [[one.run, one.held]]
                         for one in evidence}),
             os.urandom(8).hex(), ended)).lastrowid
        return self.finding(number)

    def finding_end(self, number, now):
        self.db.execute('UPDATE finding SET ended = ? WHERE id = ?'
                        ' AND ended IS NULL', (now, number))

    def mail_add(self, job, run, finding):
        """Keep the text of a mail, and no longer that of older ones."""
        lines = run.lines
        if len(lines) > MAIL_LINES:
            lines = lines[:MAIL_LINES // 2] + lines[-MAIL_LINES // 2:]
        self.db.execute(
            'INSERT INTO mail(job, at, finding, lines) VALUES (?, ?, ?, ?)',
            (job, run.at, finding, packed(lines)))
        for raised, most in (('', MAILS), ('NOT', MAILS_RAISED)):
            self.db.execute(
                'DELETE FROM mail WHERE job = ? AND finding IS %s NULL AND id'
                ' NOT IN (SELECT id FROM mail WHERE job = ? AND finding IS %s'
                ' NULL ORDER BY at DESC, id DESC LIMIT ?)' % (raised, raised),
                (job, job, most))

    def mail_of(self, finding):
        """Lines [[number, text], ...] of the mail of a finding, or []."""
        import json
        row = self.db.execute('SELECT lines FROM mail WHERE finding = ?',
                              (finding,)).fetchone()
        return json.loads(unpacked(row[0])) if row else []

    def forget(self, now):
        """Drop alarms and findings of long ago."""
        alarms_forget(self, now - 400 * DAY)
        self.db.execute('DELETE FROM finding WHERE at < ? AND ended IS NOT'
                        ' NULL AND id NOT IN (SELECT finding FROM alarm'
                        ' WHERE finding IS NOT NULL)', (now - 400 * DAY,))


def finding_text(state, finding):
    """What a mail about a finding says: the lines concerned, marked in their
    mail, and what else was not as usual.
    """
    wanted = {number for number, _ in finding.lines if number is not None}
    said = ['- ' + reason for reason in finding.also]
    if said:
        said = ['Also:'] + said + ['']
    gone = [text for number, text in finding.lines if number is None]
    if gone and finding.kind != 'absent':
        said += ['Missing:'] + ['- ' + text for text in gone[:20]] + ['']
    elif gone:
        said += gone[:50] + ['']
    lines = state.mail_of(finding.id)
    if not lines:               # it is not kept any more
        said += ['%d: %s' % (number, text) for number, text in finding.lines
                 if number is not None]
    else:
        said.append('The mail, what is unusual marked with >:')
    near = {number + i for number in wanted for i in range(-4, 5)}
    last = None
    for place, (number, text) in enumerate(lines):
        if len(lines) > 60 and number not in near and place >= 10 * (
                not wanted):
            continue
        if last is not None and number > last + 1 and len(lines) > 60:
            said.append('    ...')
        said.append('%s%4d  %s' % ('> ' if number in wanted else '  ',
                                   number, text[:300]))
        last = number
    return '\n'.join(said)


##############################################################################
# Judge
#
# The run beside the runs before it: what is usual, and what is not.  Knows
# nothing of files and of who is told.
#
# A run is observed (kinds of lines with count and place, numbers, texts),
# compared with the Memory of its job, and then learned, but for what was not
# as usual: that is held with the finding it led to.  The held part is learned
# later if somebody says `ok`, or if it has been so for ADOPT_RUNS runs and
# ADOPT_SECONDS and is no matter of life and death: a job that was changed
# gives one alarm.  What a finding is about goes by its causes, such as
# `missing 3f`: while one is open, its causes raise nothing more.
##############################################################################

# How bad: a notice is only kept for the digest, the others are told.
NOTICE, WARNING, CRITICAL = 'notice', 'warning', 'critical'
SEVERITIES = (NOTICE, WARNING, CRITICAL)

DAY = 86400.0
RUNS = 400              # that are remembered of a job
NUMBERS = 30000         # that are remembered of a job, roughly
FORGET = 120 * DAY      # a kind of line that did not come for so long
KINDS = 1500            # of lines of a job; beyond, the oldest are dropped
FEATURES = 400          # numbers of one run that are looked at
TEXTS = 8               # different texts in one place, or anything may come
ENTITIES = 20           # lines of one kind in a run told apart by number

LEARN_RUNS = 8          # before that a job is said to be learning
ADOPT_RUNS = 6
ADOPT_SECONDS = 4 * DAY

# Words of lines that people want to see, and those that may be worth a look.
STRONG = (
    r'err(?:or|ors|no)?|fail(?:ed|ure|ures|s|ing)?|fatal\w*|panic\w*|denied|'
    r'refused|corrupt\w*|abort\w*|cannot|can\'t|couldn\'t|could not|unable|'
    r'unreachable|no space|read-only file|seg(?:mentation )?fault|'
    r'core dumped|killed|out of memory|traceback|exception|invalid|'
    r'not found|no such|missing|lost|timed? ?out|timeout|broken|degraded|'
    r'critical|emergency|alert|unrecover\w*|uncorrect\w*|bad|mismatch\w*|'
    r'expired?|reject\w*|conflicts?|stale|overflow\w*|exhausted|exceed\w*|'
    r'damaged|unhealthy|offline|vulnerab\w*|violation|unauthori[sz]ed|'
    r'disconnect\w*|inconsisten\w*|wrong|dead|crash\w*|hung|not ok')
MILD = (r'warn(?:ing|ings)?|skip\w*|retry\w*|retries|deprecated|slow\w*|'
        r'ignor\w*|delay\w*|unexpected|unknown|incomplete|partial\w*|'
        r'dropped|not [a-z]+ed|problem\w*|suspicious|blocked|locked')
GRAVE = (r'fatal|panic|corrupt\w*|no space|read-only file|out of memory|'
         r'degraded|uncorrect\w*|unrecover\w*|i/o error|emergency|'
         r'input/output error|failed disk|core dumped')


class Finding:
    """What was not as usual, with one reason for people.

    kind is one of: new line, missing line, count, value, length, order, time,
    duration, status, absent.
    """

    __slots__ = ('id', 'job', 'at', 'kind', 'severity', 'reason', 'lines',
                 'token', 'ended', 'also')

    def __init__(self, id, job, at, kind, severity, reason, lines, token,
                 ended=None, also=()):
        self.id = id            # number in the state file
        self.job = job          # name of the job
        self.at = at            # epoch
        self.kind = kind
        self.severity = severity
        self.reason = reason    # one plain sentence
        self.lines = lines      # [[number in the mail or None, text], ...]
        self.token = token      # what a reply must know
        self.ended = ended      # epoch of recovery or of `ok`, or None
        self.also = also        # what else was not as usual, in sentences

    @classmethod
    def of(cls, row):
        import json
        return cls(row['id'], row['name'], row['at'], row['kind'],
                   row['severity'], row['reason'], json.loads(row['lines']),
                   row['token'], row['ended'], json.loads(row['also']))

    def as_json(self):
        return {name: getattr(self, name) for name in self.__slots__
                if name != 'token'}


class Evidence:
    """One thing that is not as usual."""

    __slots__ = ('cause', 'kind', 'severity', 'weight', 'reason', 'lines',
                 'held', 'run')

    def __init__(self, cause, kind, severity, weight, reason, lines=(),
                 held=None):
        self.cause = cause      # the same while it is the same trouble
        self.kind = kind        # of Finding
        self.severity = severity
        self.weight = weight    # the heaviest one gives the reason
        self.reason = reason
        self.lines = list(lines)
        self.held = held        # what is not learned
        self.run = None         # number of the run, set when it is judged


class Words:
    """Which lines say that something is wrong."""

    def __init__(self):
        self.strong = re.compile(r'(?<![\w-])(?:%s)(?![\w-])' % STRONG, re.I)
        self.mild = re.compile(r'(?<![\w-])(?:%s)(?![\w-])' % MILD, re.I)
        self.grave = re.compile(r'(?<!\w)(?:%s)' % GRAVE, re.I)
        # What is 0 as long as all is well, without a bad word beside it.
        self.zero = re.compile(r'\b(?:exit|return) (?:status|code)\b|'
                               r'\b(?:infected|suspect|suspicious)\b', re.I)
        # Names of files say nothing, nor do errors of which there are none.
        self.names = re.compile(r'\S*/\S*|\S+\.(?:log|txt|conf|py|sh|gz)\b')
        none = r'(?:0|no|none|without|zero|nil)'
        self.none = re.compile(
            r'(?<![\w.])%s (?:\w+ )?(?:%s|%s)(?![\w-])'
            r'|(?<!\w)(?:%s|%s)(?:\(s\))?(?: \w+)?\s*[:=]\s*'
            r'(?:(?:0|none)(?![\w.])|no(?! ?\w))' % (
                none, STRONG, MILD, STRONG, MILD), re.I)

    def found(self, line):
        """(weight 0 to 3, sorted words) of a line."""
        text = self.names.sub(' ', line)
        words = self.strong.findall(text)
        mild = self.mild.findall(text)
        if not words and not mild:
            return 0, []
        text = self.none.sub(' ', text)
        words = sorted({word.lower() for word in self.strong.findall(text)})
        if words:
            return 3 if self.grave.search(text) else 2, words
        words = sorted({word.lower() for word in self.mild.findall(text)})
        return (1, words) if words else (0, [])


class Observed:
    """What the miner sees in one run."""

    def __init__(self, run, miner, words):
        self.run = run
        self.kinds = {}         # key -> [count, place, first (number, line)]
        self.values = {}        # feature -> (value, (number, line))
        self.clock = []         # times of day and dates in the text
        self.texts = {}         # key.slot -> {text: (number, line)}
        self.words = {}         # key -> {word: (number, line)}, weight > 0
        self.weights = {}       # key -> the greatest weight of a line
        several = {}            # key -> [(values, line), ...]
        for (key, values), times, line in [
                (miner.add(line[1]), miner.times, line)
                for line in run.lines]:
            key = miner.same(key)       # a later line may have told more
            if len(self.clock) < 500:
                self.clock += times
            kind = self.kinds.get(key)
            if kind is None:
                kind = self.kinds[key] = [0, len(self.kinds), line]
            kind[0] += 1
            if kind[0] == 1 or any(isinstance(value, str)
                                   for value in values.values()):
                weight, said = words.found(line[1])
                if weight:
                    self.weights[key] = max(weight, self.weights.get(key, 0))
                    for word in said:
                        self.words.setdefault(key, {}).setdefault(word, line)
            if values and kind[0] <= 200:
                several.setdefault(key, []).append((values, line))
        for key, found in several.items():
            self._numbers(key, found)
        import zlib
        # A few times may be durations.
        self.clock = zlib.crc32(' '.join(self.clock).encode()) if any(
            '-' in one for one in self.clock) or len(self.clock) > 3 else None
        self.values['lines'] = (float(run.count), None)
        if run.seconds is not None:
            self.values['seconds'] = (float(run.seconds), None)

    def _numbers(self, key, found):
        """Name the numbers of the lines of one kind.

        A line that comes once is known by its kind; several by the texts in
        them (a mount point, a host) where those differ, else by their place.
        """
        names = ['']
        if len(found) > 1:
            names = ['@' + '|'.join(
                value for value in values.values() if isinstance(value, str)
            )[:80] for values, _ in found]
            if len(set(names)) < len(names):
                if len(found) > ENTITIES:
                    return
                names = ['#%d' % i for i in range(len(found))]
        for name, (values, line) in zip(names, found):
            for slot, value in values.items():
                if isinstance(value, str):
                    self.texts.setdefault('%s.%s' % (key, slot), {}) \
                        .setdefault(value[:80], line)
                elif len(self.values) < FEATURES and abs(value) < 1e300:
                    self.values['%s.%s%s' % (key, slot, name)] = (value, line)


class Memory:
    """What is known of one job; `data` is JSON."""

    def __init__(self, data=None):
        self.data = data or {
            'n': 0,         # runs so far; a run is known by its number
            'at': [],       # when the last ones came
            'odd': [],      # runs at a wrong time
            'blind': [],    # runs of which nothing else was learned
            'gone': [],     # runs that came after they had been missed
            'new': [],      # runs with a new kind of line
            'newbad': [],   # runs with one that had a bad word
            'clock': [],    # checksum of times in the last text, how often
                            # it was another one, how often the same
            'status': {},   # exit status -> last run
            'kinds': {},    # key -> see kind()
            'texts': {},    # key.slot -> {text: in how many runs}, None: any
            'values': {},   # feature -> [[run, ...], [value, ...]]
            'open': {},     # finding -> {causes, since, at, held}
            'told': {},     # cause -> [epoch of each finding, ...]
            'bad': [],      # causes that somebody called bad
            'fine': [],     # causes that somebody called ok
            'patience': 1,  # how much longer than usual a mail may take
        }
        for name, value in self.data.items():
            setattr(self, name, value)

    def dump(self):
        for name in self.data:
            self.data[name] = getattr(self, name)
        return self.data

    @property
    def first(self):
        """Number of the oldest run that is remembered."""
        return self.n - len(self.at)

    def kind(self, key):
        """What is known of a kind of line: runs it was in, counts and places
        there, runs that say nothing of it, bad words seen in it, when last
        seen, the last line of it.
        """
        return self.kinds.setdefault(key, {
            'n': [], 'c': [], 'p': [], 'b': [], 'w': [], 't': 0, 's': ''})

    def follow(self, miner):
        """Put together what is known of kinds that became one."""
        for old in [key for key in self.kinds if miner.same(key) != key]:
            key = miner.same(old)
            gone, kind = self.kinds.pop(old), self.kind(key)
            for n, count, place in zip(gone['n'], gone['c'], gone['p']):
                if n in kind['n']:
                    kind['c'][kind['n'].index(n)] += count
                else:
                    merge([[n, count]], kind['n'], kind['c'], kind['p'])
            kind['b'] = sorted(set(kind['b']) | set(gone['b']))
            kind['w'] += [word for word in gone['w'] if word not in kind['w']]
            if gone['t'] > kind['t']:
                kind['t'], kind['s'] = gone['t'], gone['s']
            for name in [name for name in self.values
                         if name.startswith(old + '.')]:
                runs, values = self.values.pop(name)
                merge(zip(runs, values), *self.values.setdefault(
                    key + name[len(old):], [[], []]))
            for name in [name for name in self.texts
                         if name.startswith(old + '.')]:
                texts, name = self.texts.pop(name), key + name[len(old):]
                known = self.texts.setdefault(name, {})
                if texts is None or known is None:
                    self.texts[name] = None
                else:
                    known.update(texts)

    def always(self, key, within=60):
        """In how many of the last runs it was, if in all of them; else 0."""
        kind = self.kinds[key]
        if not kind['n']:
            return 0
        start = max(kind['n'][0], self.n - within, self.first)
        blind = sum(1 for n in set(kind['b']) | set(self.blind) if n >= start)
        hits = sum(1 for n in kind['n'] if n >= start)
        if hits < self.n - start - blind:
            return 0
        # If the counts are those of chance, none is one of them.
        counts = kind['c'][-hits:]
        if hits and min(counts) < max(counts) \
                and sum(counts) < 6.5 * len(counts):
            return 0
        return hits

    def trim(self):
        """Forget what is old."""
        numbers = sum(len(column[0]) for column in self.values.values()) \
            + sum(len(kind['n']) for kind in self.kinds.values())
        keep = min(RUNS, max(30, int(
            NUMBERS * len(self.at) / max(numbers, 1))))
        if len(self.at) > keep:
            del self.at[:-keep]
        first, now = self.first, self.at[-1]
        for name in ('odd', 'blind', 'gone', 'new', 'newbad'):
            setattr(self, name, [n for n in getattr(self, name)
                                 if n >= first])
        for feature, (runs, values) in list(self.values.items()):
            cut = 0
            while cut < len(runs) and runs[cut] < first:
                cut += 1
            del runs[:cut], values[:cut]
            # What came once and never again is no feature of this job.
            if not runs or (len(runs) == 1 and runs[0] < self.n - 40):
                del self.values[feature]
        for key, kind in list(self.kinds.items()):
            cut = 0
            while cut < len(kind['n']) and kind['n'][cut] < first:
                cut += 1
            if cut:
                del kind['n'][:cut], kind['c'][:cut], kind['p'][:cut]
            kind['b'] = [n for n in kind['b'] if n >= first]
            if not kind['n'] and kind['t'] < now - FORGET:
                del self.kinds[key]
        if len(self.kinds) > KINDS:
            oldest = sorted(self.kinds, key=lambda k: self.kinds[k]['t'])
            for key in oldest[:-KINDS]:
                del self.kinds[key]
        for slot, texts in list(self.texts.items()):
            if slot.partition('.')[0] not in self.kinds:
                del self.texts[slot]
        for cause, times in list(self.told.items()):
            times = [at for at in times if at > now - FORGET]
            if times:
                self.told[cause] = times
            else:
                del self.told[cause]


def amount(value):
    """A number as people write it."""
    if value == int(value) and abs(value) < 1e6:
        return '%d' % value
    if abs(value) >= 1e6:
        for power, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
            if abs(value) >= power:
                return '%.3g%s' % (value / power, unit)
    return '%.3g' % value


def period(seconds):
    """A length of time as people say it."""
    for unit, name in ((DAY * 7, 'week'), (DAY, 'day'), (3600, 'hour'),
                       (60, 'minute')):
        if seconds >= 1.5 * unit:
            return '%.3g %ss' % (round(seconds / unit, 0 if seconds > 9 * unit
                                       else 1), name)
    return '%d seconds' % seconds


def quoted(text, most=100):
    """A line within a sentence."""
    text = ' '.join(text.split())
    return '"%s"' % (text if len(text) <= most else text[:most - 3] + '...')


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    if len(values) % 2:
        return values[middle]
    return (values[middle - 1] + values[middle]) / 2


def scaled(value, scale):
    """A number on the scale on which its chance is alike up and down."""
    import math
    if scale == 'count':                # Poisson: one standard deviation is 1
        return 2 * math.sqrt(max(value, 0) + 0.375)
    if scale == 'log':
        return math.log1p(max(value, 0))
    return value


def out_of_range(values, value, scale, doubt):
    """How far `value` is out of the range of `values`: 0 within, 1 and more
    if it is beyond what may be expected; negative for too small.

    Half of the range that was seen is added on each side, more while few
    values are known.  For a normal distribution that is one false alarm in
    some ten thousand values, with 8 values known as with 100.
    """
    above = -1 if scale == 'ratio' else 0   # none of whole things says more
    if scale == 'ratio':
        unit = 100 / (median(values) or 1)
        values, value = [one * unit for one in values], value * unit
        scale = 'log'
    known = [scaled(one, scale) for one in values]
    low, high = min(known), max(known)
    middle = median(known)
    if scale == 'count':
        # Of numbers of chance 3.5; less of those that hardly vary.
        mean = sum(known) / len(known)
        wide = (sum((one - mean) ** 2 for one in known) / len(known)) ** 0.5
        least = min(3.5, max(1.2, 5 * wide)) if high > low else 2.5
    elif scale == 'log':
        least = 0.45
    else:
        least = max(abs(middle) * 0.03, 1.5 if all(
            one == int(one) for one in values) else 1e-9)
    margin = doubt * max((high - low) * 0.5 * (1 + 8 / len(known)), least)
    place = scaled(value, scale)
    if scale == 'log' and above < value < min(values):
        usual = sorted(values)
        cut = (len(usual) + 19) // 20
        if usual[0] - value < 0.2 * (usual[-1 - cut] - usual[cut]):
            return 0.0          # numbers of processes: as good as any
    if place > high:
        return (place - high) / margin
    if place < low:
        return (place - low) / margin
    return 0.0


class Judge:
    """Compares one run with the memory of its job."""

    def __init__(self, memory, miner, observed, words):
        self.memory = memory
        self.miner = miner
        self.observed = observed
        self.run = observed.run
        self.words = words
        self.evidence = []
        self.whole = False      # nothing of this run is like it was
        self.reworded = {}      # new kind of line -> the one it was
        self._shapes = None
        # A job that was often wrongly said to be unusual is believed less.
        recent = sum(1 for cause, times in memory.told.items()
                     if cause not in memory.bad
                     for at in times if at > self.run.at - 60 * DAY)
        self.doubt = 1 + 0.1 * min(recent, 5)

    def judge(self):
        """The list of Evidence, the heaviest first."""
        self.status()
        if self.memory.n >= 3:
            self.length()
        if not self.whole:
            self.new_lines()
            self.missing_lines()
            self.counts()
            self.texts()
            self.numbers()
            self.stale()
            self.order()
        self.time()
        # A number says more than that the word before it is new there.
        numbers = {one.cause.split()[1].partition('.')[0]: one
                   for one in self.evidence if one.kind == 'value'
                   and one.cause.startswith('value ')}
        for one in list(self.evidence):
            number = numbers.get(one.cause.split()[1]) \
                if one.cause.startswith('word ') else None
            if number is not None:
                number.weight = max(number.weight, one.weight)
                number.severity = max(number.severity, one.severity,
                                      key=SEVERITIES.index)
                self.evidence.remove(one)
        fine = set(self.memory.fine)
        for one in self.evidence:
            if one.cause in self.memory.bad:
                one.severity = max(one.severity, WARNING,
                                   key=SEVERITIES.index)
        self.evidence = [one for one in self.evidence
                         if one.cause not in fine]
        self.evidence.sort(key=lambda one: (
            -SEVERITIES.index(one.severity), -one.weight))
        return self.evidence

    def say(self, *args, **kwargs):
        self.evidence.append(Evidence(*args, **kwargs))

    def status(self):
        status = self.run.status
        known = self.memory.status
        if str(status) in known or status in (None, 0):
            return
        usual = ''
        if known:
            usual = ', where %s is usual' % ' or '.join(
                'no failure' if name == 'None' else name
                for name in sorted(known))
        text = 'killed by signal %d' % -status if status < 0 \
            else 'exit status %d' % status
        self.say('status %s' % status, 'status', CRITICAL
                 if self.memory.n >= LEARN_RUNS and '0' in known
                 else WARNING, 100, text + usual)

    def length(self):
        """A mail without text, or ten times as long as ever."""
        runs, values = self.memory.values.get('lines', ([], []))
        count = self.observed.values['lines'][0]
        if len(values) < 4:
            return
        least, most = min(values), max(values)
        if least > 0 and not any(number for number, _ in self.run.lines):
            self.whole = True
            self.say('empty', 'length', WARNING, 90,
                     'the mail is empty; usually it has %s lines'
                     % self.range(values))
        elif count > 10 * most and count > 40:
            self.whole = True
            self.say('flood', 'length', WARNING, 60, '%d lines, usually %s'
                     % (count, self.range(values)),
                     self.worst_lines())
        elif len(values) >= 15 and abs(count - median(values)) >= 5:
            far = out_of_range(values, count, 'count', self.doubt)
            if abs(far) > 1:
                self.say('long' if far > 0 else 'short', 'length', WARNING,
                         30, '%d lines, usually %s' % (
                             count, self.range(values)), held=count)

    def worst_lines(self):
        """Of a mail that is much too long, what is new, the worst first."""
        new = [(-self.observed.weights.get(key, 0), place, line)
               for key, (_, place, line) in self.observed.kinds.items()
               if key not in self.memory.kinds]
        return [line for _, _, line in sorted(new)[:10]]

    @staticmethod
    def range(values):
        """The usual range in words: without the rarest 5 % on each side."""
        values = sorted(values)
        cut = len(values) // 20
        low, high = values[cut], values[-1 - cut]
        if low == high:
            return amount(low)
        return '%s to %s' % (amount(low), amount(high))

    def novelty(self, runs, skip=5):
        """Share of runs with a new kind of line, but for the first ones, and
        how many it is of.
        """
        considered = min(60, max(0, self.memory.n - skip))
        found = sum(1 for n in set(runs)
                    if n >= max(skip, self.memory.n - considered))
        return (found + 0.5) / (considered + 1), considered

    def new_lines(self):
        memory, observed = self.memory, self.observed
        rate, runs = self.novelty(memory.new)
        badrate, _ = self.novelty(memory.newbad, 1)
        self.rewordings()
        for key, (count, place, line) in observed.kinds.items():
            weight = observed.weights.get(key, 0)
            said = list(observed.words.get(key, {}))
            kind = memory.kinds.get(key)
            cause = 'new ' + key
            if kind is not None:
                # A known kind of line with a bad word it never had.
                said = [word for word in said if word not in kind['w']]
                if not said or len(kind['n']) < 3:
                    continue
                line = observed.words[key][said[0]]
                weight = self.words.found(line[1])[0]
                cause = 'word %s %s' % (key, said[0])
            severity = NOTICE
            if weight >= 2 and (badrate < 0.2 or weight > 2
                                or memory.n == 0):
                severity = CRITICAL if weight > 2 else WARNING
            elif weight == 1 and runs >= 5 and rate < 0.15:
                severity = WARNING
            elif runs >= 10 and rate * self.doubt < 0.05:
                severity = WARNING
            if key in self.reworded or severity != NOTICE and kind is None \
                    and self.shape(line[1]) in self.shapes():
                severity, weight = NOTICE, 0
            if memory.n < 3 and weight < 2:
                continue
            if memory.n == 0 and weight >= 2 and len(observed.kinds) > 12:
                severity = NOTICE
            times = '' if count == 1 else ' (%d times)' % count
            what = 'a new kind of line'
            if memory.n == 0:
                what = 'the first mail of this job'
            if said and weight:
                what += ' says "%s"' % said[0]
            self.say(cause, 'new line', severity, 50 + 12 * weight,
                     '%s%s: %s' % (what, times, quoted(line[1])), [line],
                     held=[count, place])

    @staticmethod
    def shape(line):
        """A line without what has digits: a new version is no news."""
        return re.sub(r'\S*\d\S*', '#', line[:160])

    def shapes(self):
        """{shape: key} of all lines known."""
        if self._shapes is None:
            self._shapes = {self.shape(kind['s']): key
                            for key, kind in self.memory.kinds.items()}
        return self._shapes

    def rewordings(self):
        """Find new kinds of lines that are old ones with a few words more, or
        with other numbers: a new version of the program says it so.
        """
        memory, observed = self.memory, self.observed
        new = [key for key in observed.kinds if key not in memory.kinds]
        if not new:
            return
        old = {key: self.shape(kind['s']).split()
               for key, kind in memory.kinds.items()
               if key not in observed.kinds and kind['n'][-1:] == [
                   memory.n - 1]}
        for key in new[:200]:
            words = self.shape(observed.kinds[key][2][1]).split()
            for other, before in list(old.items()):
                more = len(words) - len(before)
                if not 0 <= more <= max(1, len(before) // 2):
                    continue
                rest = iter(words)
                if all(word in rest for word in before):
                    added = ' '.join(words)
                    for word in before:
                        added = added.replace(word, '', 1)
                    if not self.words.found(added)[0] and not re.search(
                            r'\b(not?|never|without)\b', added, re.I):
                        self.reworded[key] = other
                        del old[other]
                        break

    def missing_lines(self):
        memory, observed = self.memory, self.observed
        gone = []
        replaced = set(self.reworded.values())
        for key, kind in memory.kinds.items():
            if key in observed.kinds or key in replaced:
                continue
            runs = memory.always(key)
            if runs >= 12:
                gone.append((runs, key, kind,
                             'in each of the last %d mails' % runs))
                continue
            season = self.seasonal(key, kind)
            if season:
                gone.append((runs, key, kind, season))
        gone.sort(key=lambda one: -one[0])
        for runs, key, kind, when in gone:
            reason = '%s is missing; it was %s' % (quoted(kind['s']), when)
            if len(gone) > 1:
                reason = '%d lines are missing that were always there, as %s' \
                    % (len(gone), quoted(kind['s']))
            self.say('missing ' + key, 'missing line', WARNING,
                     55 + min(len(gone), 10), reason, [(None, kind['s'])])

    def seasonal(self, key, kind):
        """If a line comes on such a day each time: when, in words."""
        memory = self.memory
        if len(kind['n']) < 5 or memory.n - kind['n'][-1] > 100:
            return None
        now = time.localtime(self.run.at)
        had = set(kind['n'])
        blind = set(kind['b']) | set(memory.blind)
        for index, words in ((6, 'each %s' % time.strftime('%A', now)),
                             (2, 'on each %d. of a month' % now[2])):
            same = other = hits = 0
            for n in range(max(memory.first, kind['n'][0]), memory.n):
                if n in blind:
                    continue
                if time.localtime(memory.at[n - memory.first])[index] \
                        == now[index]:
                    same += 1
                    hits += n in had
                else:
                    other += n in had
            if hits >= 5 and hits == same and other * 5 < hits:
                return words
        return None

    def counts(self):
        """How often each kind of line came."""
        memory = self.memory
        for key, (count, _, line) in self.observed.kinds.items():
            kind = memory.kinds.get(key)
            if kind is None or len(kind['n']) < 5:
                continue
            values = list(kind['c'])
            start = kind['n'][0]
            runs = memory.n - start
            if runs < 10:
                continue
            blind = sum(1 for n in set(kind['b']) | set(memory.blind)
                        if n >= start)
            values += [0] * max(0, runs - len(values) - blind)
            far = out_of_range(values, count, 'count', self.doubt)
            usual = 'usually %s times' % self.range(values)
            constant = min(values) == max(values)
            weight = self.observed.weights.get(key, 0)
            severity = None
            if constant and count != values[0] and len(values) >= 15:
                severity = WARNING if count < values[0] \
                    or count > 1.5 * values[0] + 1 or weight else NOTICE
            elif abs(far) > 1:
                severity = WARNING
            elif weight > 1 and far > 0.6:
                severity = WARNING
            if severity:
                self.say('count ' + key, 'count', severity, 40 + 10 * weight
                         + min(abs(far), 5), '%d times, %s: %s'
                         % (count, usual, quoted(line[1])), [line],
                         held=count)

    def texts(self):
        """A word where another one, or one of a few, always was."""
        memory = self.memory
        for slot, texts in self.observed.texts.items():
            known = memory.texts.get(slot)
            key = slot.partition('.')[0]
            if not known or len(known) > 3 or key not in memory.kinds:
                continue
            runs = sum(known.values())
            if runs < max(15, 0.8 * len(memory.kinds[key]['n'])) \
                    or (len(known) - 0.5) / (runs + 1) * self.doubt > 0.05:
                continue
            for text, line in texts.items():
                if text in known or re.search(r'\d', text):
                    continue
                self.say('text %s %s' % (slot, text), 'new line', WARNING,
                         48, '%s, where %s always was: %s' % (
                             quoted(text, 40), ' or '.join(
                                 quoted(one, 40) for one in known),
                             quoted(line[1])), [line], held=text)

    def numbers(self):
        """The numbers within lines, and the duration."""
        told = set()
        for feature, (value, line) in self.observed.values.items():
            if feature == 'lines':
                continue
            runs, values = self.memory.values.get(feature, ((), ()))
            if len(values) < 8:
                continue
            key = feature.partition('.')[0]
            if key in told:
                continue
            found = self.number(feature, runs, values, value, line)
            if found:
                told.add(key)
                severity, weight, reason = found
                self.say('value ' + feature,
                         'duration' if feature == 'seconds' else 'value',
                         severity, weight, reason,
                         [line] if line else [], held=value)

    def number(self, feature, runs, values, value, line):
        """(severity, weight, reason) if one number is not as usual."""
        low, high = min(values), max(values)
        usual = self.range(values)
        if feature == 'seconds':
            far = out_of_range(values, value, 'log', self.doubt)
            if abs(far) > 1 and (abs(value - high) > 60 if far > 0
                                 else low - value > 10):
                return WARNING, 35, 'it took %s, usually %s' % (
                    period(value), ' to '.join(sorted({
                        period(low), period(high)}, key=len)))
            return None
        weight = self.observed.weights.get(feature.partition('.')[0], 0)
        where = '%s, usually %s: %s' % (amount(value), usual,
                                        quoted(line[1]))
        if low == high:
            if value == low:
                return None
            return self.constant(values, value, weight, where)
        scale = 'log' if low >= 0 and high >= 20 and not (
            high <= 100 and '%' in line[1]) else 'linear'
        if low >= 0 and high < 20:
            if all(one == int(one) for one in values):
                scale = 'count'
            elif low > 0:
                scale = 'ratio'
        far = out_of_range(values, value, scale, self.doubt)
        if abs(far) > 1:
            steps = self.steps(values, value)
            if steps is not None and abs(steps) <= 1:
                return None
            return WARNING, 45 + min(abs(far), 5), where
        steps = self.steps(values, value)
        if steps is not None and abs(steps) > 1 \
                and 'value ' + feature not in self.memory.told:
            return WARNING, 42, '%s after %s, a step as never before: %s' % (
                amount(value), amount(values[-1]), quoted(line[1]))
        return self.drift(values, value, scale, line) \
            or self.full(runs, values, value, line) \
            or self.stuck(values, value, line)

    def constant(self, values, value, weight, where):
        if len(values) < 15:
            return None
        if values[0] == 0:
            if self.words.found(where)[0] or self.words.zero.search(where) \
                    or len(values) >= 60:
                return WARNING, 44, where
            return NOTICE, 20, where
        if abs(values[0]) < 1000 and values[0] == int(values[0]) \
                and abs(value - values[0]) > 0.05 * abs(values[0]):
            return WARNING, 43, where
        return NOTICE, 20, where

    def steps(self, values, value):
        """How far a step is out of the range of steps, for a number that
        goes on from where it was (disk use); None if it does not.
        """
        if len(values) < 12:
            return None
        steps = [b - a for a, b in zip(values, values[1:])]
        if max(map(abs, steps)) * 2.5 > max(values) - min(values):
            return None
        far = out_of_range(steps, value - values[-1], 'linear', self.doubt)
        beyond = max(value - values[-1] - max(steps),
                     min(steps) - value + values[-1])
        if far < 0 and value > values[-1] / 2:
            return 0.0          # somebody cleaned up
        return far if beyond > 0.2 * (max(values) - min(values)) else 0.0

    def drift(self, values, value, scale, line):
        """A number that leaves its range in small steps, which would widen
        the range before it is out of it.
        """
        before, since = values[:-6], values[-2:] + [value]
        if len(before) < 15:
            return None
        far = [out_of_range(before, one, scale, self.doubt) for one in since]
        if min(far) > 0.9 or max(far) < -0.9:
            return WARNING, 40, '%s and moving on, usually %s: %s' % (
                amount(value), self.range(before), quoted(line[1]))
        return None

    def full(self, runs, values, value, line):
        """A share that grows and will be 100 % within two weeks."""
        if not 80 <= value <= 100 or '%' not in line[1] \
                or value <= max(values) or len(values) < 10:
            return None
        memory = self.memory
        past = [(memory.at[n - memory.first], one)
                for n, one in zip(runs, values) if n >= memory.first][-30:]
        fallen = max([0] + [a - b for (_, a), (_, b) in zip(past, past[1:])])
        if not past or value - past[0][1] < max(3, 4 * fallen):
            return None
        speed = (value - past[0][1]) / (self.run.at - past[0][0])
        if speed <= 0 or value < 90 \
                or (100 - value) / speed > 14 * DAY:
            return None
        return WARNING, 46, '%s%% and growing: full in about %s: %s' % (
            amount(value), period(max((100 - value) / speed, 3600)),
            quoted(line[1]))

    def stuck(self, values, value, line):
        """A number that was another one each time stands still."""
        past = values[-60:]
        if len(past) < 20 or past[-1] != value or past[-2] != value \
                or len(set(past)) < len(past) - 1:
            return None
        return WARNING, 41, '%s for the third time; it was another number ' \
            'each time before: %s' % (amount(value), quoted(line[1]))

    def stale(self):
        """The last mail once more: numbers that hardly ever are the same
        twice all stand still.
        """
        import math
        lively, still, surprise = 0, [], 0.0
        for feature, (value, line) in self.observed.values.items():
            _, values = self.memory.values.get(feature, ((), ()))
            if len(values) < 12 or line is None:
                continue
            past = values[-40:]
            same = sum(1 for a, b in zip(past, past[1:]) if a == b)
            if same > len(past) / 8:
                continue
            lively += 1
            if value == past[-1] and value:
                still.append(line)
                surprise -= math.log((same + 0.5) / len(past))
        clock, moved, stood = self.memory.clock or (None, 0, 0)
        if self.observed.clock is not None \
                and clock == self.observed.clock and moved >= 10 > stood * 20:
            self.say('stale', 'value', WARNING, 47, 'the times in it are '
                     'those of the last mail; they moved on each time before',
                     [line for line in self.run.lines
                      if re.search(r'\d:\d\d|\d{4}-\d\d-\d\d', line[1])][:10])
        elif len(still) > 0.7 * lively and surprise > 9:
            self.say('stale', 'value', WARNING, 47, 'the numbers are those '
                     'of the last mail; they differed each time before',
                     still[:10])

    def order(self):
        """Lines that always came one after the other, the other way round."""
        memory, observed = self.memory, self.observed
        fixed = [key for key in observed.kinds
                 if key in memory.kinds and len(memory.kinds[key]['n']) >= 12]
        if len(fixed) > 60:
            fixed = fixed[:60]
        places = {}
        for a, b in zip(fixed, fixed[1:]):
            for key in (a, b):
                if key not in places:
                    kind = memory.kinds[key]
                    places[key] = dict(zip(kind['n'], kind['p']))
            both = [n for n, place in places[a].items()
                    if place >= 0 and places[b].get(n, -1) >= 0]
            if len(both) >= 12 and all(
                    places[b][n] < places[a][n] for n in both):
                first = observed.kinds[a][2]
                second = observed.kinds[b][2]
                self.say('order %s %s' % (a, b), 'order', WARNING, 25,
                         '%s comes before %s; it was the other way round in '
                         'the last %d mails' % (
                             quoted(first[1], 60), quoted(second[1], 60),
                             len(both)), [first, second])
                return

    def believed(self):
        """When the runs came that came as they should."""
        memory = self.memory
        odd = set(memory.odd)
        return [at for n, at in enumerate(memory.at, memory.first)
                if n not in odd]

    def time(self):
        """A mail at an hour, on a day or so soon as never before."""
        times = self.believed()
        if len(times) < 10:
            return
        now = self.run.at
        gaps = [b - a for a, b in zip(times, times[1:])]
        clock = time.strftime('%H:%M', time.localtime(now))
        day = time.strftime('%A', time.localtime(now))
        if median(gaps) > 0.9 * DAY:
            mine = day_seconds(now)
            known = [day_seconds(at) for at in times[-90:]]
            away = min(min(abs(mine - one), DAY - abs(mine - one))
                       for one in known)
            spread = sorted(min((one - known[-1]) % DAY,
                                (known[-1] - one) % DAY) for one in known)
            if away > max(5400, 2 * spread[-1 - len(spread) // 20]):
                self.say('time', 'time', WARNING, 28,
                         'it came at %s, usually about %s' % (
                             clock, time.strftime('%H:%M', time.localtime(
                                 times[-1]))))
                return
            days = {time.localtime(at)[6] for at in times}
            if time.localtime(now)[6] not in days and len(days) <= 5 \
                    and times[-1] - times[0] > 35 * DAY:
                self.say('time', 'time', WARNING, 28,
                         'it came on a %s, as never before' % day)
                return
        least = sorted(gaps[-60:])[len(gaps[-60:]) // 20]
        soon = 0.3 * least
        # Where it comes often, one that came twice is nothing yet.
        if least > 600 and now - times[-1] < soon and (
                least > DAY / 4 or gaps[-1] < soon):
            self.say('time', 'time', WARNING, 27,
                     'it came again after %s, usually after %s' % (
                         period(now - times[-1]), period(median(gaps))))


def day_seconds(at):
    """Seconds since midnight, as the clock on the wall shows it."""
    now = time.localtime(at)
    return now[3] * 3600.0 + now[4] * 60 + now[5]


def next_due(memory):
    """(due, usual gap): when a mail of this job is missed; None if never.

    What followed on runs at the same hour of the same weekday says it, else
    on runs at the same hour, else all runs.
    """
    import math
    skip = set(memory.odd)
    times = [(n, at) for n, at in enumerate(memory.at, memory.first)
             if n not in skip]
    if len(times) < 4:
        return None
    last = memory.at[-1]
    gone = set(memory.gone)
    pairs = [(a, b - a) for (_, a), (n, b) in zip(times, times[1:])
             if n not in gone]
    usual = median([gap for _, gap in pairs[-60:]] or [0])
    if len(pairs) < (3 if usual > 20 * DAY else 5 if usual > 5 * DAY else 8):
        return None
    hour, day = day_seconds(last), time.localtime(last)[6]
    near = [(at, gap) for at, gap in pairs if min(
        abs(day_seconds(at) - hour),
        DAY - abs(day_seconds(at) - hour)) < 5400]
    same = [gap for at, gap in near if time.localtime(at)[6] == day]
    if len(same) < 4 or usual > 5 * DAY:
        same = [gap for _, gap in near]
    if len(same) < 6 or usual > 5 * DAY:
        same = [gap for _, gap in pairs]
    same = same[-60:]
    usual = median(same)
    long = [gap for gap in same if gap > 1.5 * usual + 600]
    most = max(gap for gap in same if gap <= 1.5 * usual + 600)
    hours = {}
    for at, gap in pairs:
        hours.setdefault(round(day_seconds(at) / 3600), []).append(gap)
    spread = [sorted(gaps)[-2:] for gaps in hours.values() if len(gaps) > 2]
    wild = sum(1 for low, high in spread if high > 1.2 * low + 600)
    if len(long) > (0 if 'absent' in memory.told else 1) or (len(spread) > 3
                                      and wild > len(spread) / 4):
        # It leaves some out: as many in a row as will hardly ever be.
        if len(pairs) < 15:
            return None
        share = (len(long) + 1) / (len(same) + 1)
        most = max(2 * max(gap for _, gap in pairs), usual
                   * math.log(1e-4) / math.log(min(share, 0.8)))
    wait = most + max(600, 0.1 * most)
    return last + max(wait, memory.patience * usual), usual


def run_learn(memory, observed, evidence):
    """Take a run into memory, but for what was not as usual."""
    run, n = observed.run, memory.n
    causes = {one.cause for one in evidence if one.severity != NOTICE}
    memory.at.append(run.at)
    memory.n += 1
    if not causes & {'status %s' % run.status}:
        memory.status[str(run.status)] = n
    if 'time' in causes:
        memory.odd.append(n)
    if causes & {'empty', 'flood', 'time'}:
        memory.blind.append(n)
        memory.trim()
        return
    if observed.clock is not None:
        clock, moved, stood = memory.clock or (None, 0, 0)
        if clock != observed.clock:
            moved += 1
        elif 'stale' not in causes:
            stood += 1
        memory.clock = [observed.clock, moved, stood]
    for one in evidence:
        if one.cause.startswith(('new ', 'word ')):
            (memory.newbad if one.weight > 70 else memory.new).append(n)
    lines_learn(memory, observed, causes, n)
    numbers_learn(memory, observed, causes, n)
    memory.trim()


def lines_learn(memory, observed, causes, n):
    """Learn the kinds of lines of run n."""
    ordered = not any(cause.startswith('order ') for cause in causes)
    for key, (count, place, line) in observed.kinds.items():
        if 'new ' + key in causes:
            continue
        kind = memory.kind(key)
        kind['t'], kind['s'] = observed.run.at, line[1][:160]
        for word in observed.words.get(key, ()):
            if word not in kind['w'] \
                    and 'word %s %s' % (key, word) not in causes:
                kind['w'].append(word)
        if 'count ' + key in causes:
            kind['b'].append(n)
            continue
        kind['n'].append(n)
        kind['c'].append(count)
        kind['p'].append(place if ordered else -1)
    for cause in causes:
        if cause.startswith('missing '):
            memory.kind(cause[8:])['b'].append(n)


def numbers_learn(memory, observed, causes, n):
    """Learn what stood in the lines of run n, and how many there were."""
    for feature, (value, _) in observed.values.items():
        if 'value ' + feature in causes or (
                feature == 'lines' and causes & {'long', 'short'}):
            continue
        column = memory.values.setdefault(feature, [[], []])
        column[0].append(n)
        column[1].append(value)
    for slot, texts in observed.texts.items():
        known = memory.texts.setdefault(slot, {})
        if known is None:
            continue
        for text in texts:
            if 'text %s %s' % (slot, text) not in causes:
                known[text] = known.get(text, 0) + 1
        if len(known) > TEXTS:
            memory.texts[slot] = None


def cause_learn(memory, cause, held):
    """Take what was held for a cause into memory: it is normal.

    `held` is [[run number, what], ...].
    """
    word, _, rest = cause.partition(' ')
    runs = [n for n, _ in held]
    if word == 'new':
        kind = memory.kind(rest)
        for n, what in held:
            if what and n not in kind['n']:
                kind['n'].append(n)
                kind['c'].append(what[0])
                kind['p'].append(what[1])
        kind['t'] = max(kind['t'], memory.at[-1])
    elif word == 'word':
        key, _, said = rest.partition(' ')
        if said not in memory.kind(key)['w']:
            memory.kind(key)['w'].append(said)
    elif word == 'text':
        slot, _, text = rest.partition(' ')
        memory.texts.setdefault(slot, {})
        if memory.texts[slot] is not None:
            memory.texts[slot][text] = len(held)
    elif word == 'missing':
        kind = memory.kind(rest)
        kind['b'] = [n for n in kind['b'] if n not in runs]
    elif word == 'count':
        kind = memory.kind(rest)
        kind['b'] = [n for n in kind['b'] if n not in runs]
        merge(held, kind['n'], kind['c'], kind['p'])
    elif word in ('value', 'long', 'short'):
        merge(held, *memory.values.setdefault(rest or 'lines', [[], []]))
    elif word == 'status':
        memory.status[rest] = memory.n
    elif word == 'time':
        memory.odd = [n for n in memory.odd if n not in runs]
    else:                       # order, empty, flood, stale
        if cause not in memory.fine:
            memory.fine.append(cause)


def cause_unlearn(memory, cause, held):
    """Take what led to a finding out of memory: it is not normal."""
    word, _, rest = cause.partition(' ')
    if word == 'new':
        memory.kinds.pop(rest, None)
    elif word == 'word':
        key, _, said = rest.partition(' ')
        if key in memory.kinds and said in memory.kinds[key]['w']:
            memory.kinds[key]['w'].remove(said)
    elif word == 'text':
        slot, _, text = rest.partition(' ')
        (memory.texts.get(slot) or {}).pop(text, None)
    elif word == 'status':
        memory.status.pop(rest, None)
    elif word == 'value' and rest in memory.values:
        runs, values = memory.values[rest]
        for n, _ in held:
            if n in runs:
                del values[runs.index(n)]
                runs.remove(n)
    if cause in memory.fine:
        memory.fine.remove(cause)


def merge(held, runs, values, places=None):
    """Put held values where they belong by the number of their run."""
    for n, value in held:
        if value is None or n in runs:
            continue
        place = len(runs)
        while place and runs[place - 1] > n:
            place -= 1
        runs.insert(place, n)
        values.insert(place, value)
        if places is not None:
            places.insert(place, -1)


##############################################################################
# Alarms: what is kept
#
# An alarm is kept before anything is sent, in the transaction of what raised
# it.  From then on it is steps: one person told in one way at one time, until
# somebody answers.  Knows nothing of mails that came and of why something was
# found.
#
#     alarm     open -> acked -> over; its steps are due at base + after
#     step      who is told, how and when; notice is NULL until then
#     notice    one message or call, which may be about several alarms:
#               ready -> trying -> sent | failed | dropped
##############################################################################

ALARM_SCHEMA = '''
CREATE TABLE IF NOT EXISTS alarm(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    finding INTEGER UNIQUE          -- NULL: of a script
        REFERENCES finding ON DELETE SET NULL,
    cause TEXT,                     -- a script's name for it
    severity TEXT NOT NULL,
    title TEXT NOT NULL,            -- one line
    body TEXT NOT NULL,             -- what else there is to say
    at REAL NOT NULL,
    base REAL NOT NULL,             -- what steps count their time from
    planned INTEGER NOT NULL DEFAULT 0,
    times INTEGER NOT NULL DEFAULT 1,
    state TEXT NOT NULL DEFAULT 'open',
    ended REAL,                     -- when it was acked or over
    who TEXT,                       -- acked it
    why TEXT);                      -- how it was acked, or why it is over
CREATE INDEX IF NOT EXISTS alarm_open ON alarm(state, base);
CREATE TABLE IF NOT EXISTS step(
    id INTEGER PRIMARY KEY,
    alarm INTEGER NOT NULL REFERENCES alarm,
    kind TEXT NOT NULL,             -- raise, over
    after REAL NOT NULL,            -- seconds
    person TEXT NOT NULL,
    way TEXT NOT NULL,              -- mail, sms, call
    notice INTEGER REFERENCES notice);
CREATE INDEX IF NOT EXISTS step_alarm ON step(alarm);
CREATE INDEX IF NOT EXISTS step_notice ON step(notice);
CREATE INDEX IF NOT EXISTS step_over ON step(alarm)
    WHERE kind = 'over' AND notice IS NULL;
CREATE TABLE IF NOT EXISTS notice(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    person TEXT NOT NULL,
    way TEXT NOT NULL,
    address TEXT NOT NULL,
    code TEXT NOT NULL,             -- what an answer names it by
    text TEXT NOT NULL DEFAULT '',  -- of an SMS, to know it again
    state TEXT NOT NULL DEFAULT 'ready',
    tries INTEGER NOT NULL DEFAULT 0,
    tried REAL,                     -- when the last try began
    next REAL NOT NULL,             -- when there is something to do
    sid TEXT,                       -- Twilio's name for it
    said TEXT);                     -- what was wrong
CREATE INDEX IF NOT EXISTS notice_next ON notice(next)
    WHERE state IN ('ready', 'trying');
CREATE INDEX IF NOT EXISTS notice_sid ON notice(sid);
CREATE TABLE IF NOT EXISTS stopped(number TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS heard(sid TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS probe(
    cause TEXT PRIMARY KEY,
    bad INTEGER NOT NULL);          -- times in a row
CREATE TABLE IF NOT EXISTS alarm_secret(value BLOB NOT NULL);
'''

RANKS = {name: rank for rank, name in enumerate(SEVERITIES)}


def raise_alarm(state, finding, now):
    """Keep the alarm of a Finding; sends nothing.

    Runs within the transaction of the finding.  alarms_send sends.
    """
    state.db.execute(
        'INSERT OR IGNORE INTO alarm(finding, severity, title, body, at, base)'
        ' VALUES (?, ?, ?, ?, ?, ?)',
        (finding.id, finding.severity, alarm_line(
            '%s: %s' % (finding.job, finding.reason)),
         finding_text(state, finding), now, now))


def end_alarm(state, finding, now, why):
    """The cause of `finding` is gone (`why` in words for people, as `it came
    after all`), or somebody said that it is normal: stop calling, and tell
    those who were told.  Runs within a transaction; sends nothing.
    """
    for alarm, in state.db.execute(
            "SELECT id FROM alarm WHERE finding = ? AND state != 'over'",
            (finding.id,)).fetchall():
        alarm_over(state, alarm, now, why)


def alarm_raise(state, severity, cause, text, now):
    """Keep an alarm of a script; its number.  Runs within a transaction.

    While one of the same cause is not over, it is that one: a worse one is
    told anew, any other is only counted.
    """
    title, _, body = text.strip().partition('\n')
    title, body = alarm_line(title), body.strip('\n')
    old = cause and state.db.execute(
        "SELECT id, severity, state FROM alarm WHERE cause = ?"
        " AND state != 'over'", (cause,)).fetchone()
    if not old:
        return state.db.execute(
            'INSERT INTO alarm(cause, severity, title, body, at, base)'
            ' VALUES (?, ?, ?, ?, ?, ?)',
            (cause, severity, title, body, now, now)).lastrowid
    state.db.execute('UPDATE alarm SET times = times + 1 WHERE id = ?',
                     (old['id'],))
    if RANKS[severity] > RANKS[old['severity']]:
        state.db.execute('DELETE FROM step WHERE alarm = ? AND notice IS NULL',
                         (old['id'],))
        state.db.execute(
            "UPDATE alarm SET severity = ?, title = ?, body = ?, base = ?,"
            " planned = 0, state = 'open', ended = NULL WHERE id = ?",
            (severity, title, body, now, old['id']))
    return old['id']


def alarm_over(state, alarm, now, why):
    """Alarm number `alarm` is over.  Runs within a transaction."""
    state.db.execute(
        "UPDATE alarm SET state = 'over', ended = ?, base = ?, why = ?"
        " WHERE id = ?", (now, now, why, alarm))
    alarm_tell_over(state, alarm)


def alarm_tell_over(state, alarm):
    """Steps that tell who was told of an alarm that it is over, once."""
    state.db.execute(
        "INSERT INTO step(alarm, kind, after, person, way)"
        " SELECT DISTINCT step.alarm, 'over', 0, step.person, step.way"
        " FROM step JOIN alarm ON alarm.id = step.alarm"
        " JOIN notice ON notice.id = step.notice"
        " WHERE step.alarm = ? AND alarm.state = 'over'"
        " AND step.kind = 'raise' AND step.way IN ('mail', 'sms')"
        " AND notice.state = 'sent' AND NOT EXISTS (SELECT * FROM step AS old"
        " WHERE old.alarm = step.alarm AND old.kind = 'over'"
        " AND old.person = step.person AND old.way = step.way)", (alarm,))


def alarms_take(state, alarms, who, how, now):
    """Somebody takes care of the alarms, so that nobody is told of them from
    now on; the numbers of those that were open.  Runs within a transaction.
    """
    return [number for number in dict.fromkeys(alarms) if state.db.execute(
        "UPDATE alarm SET state = 'acked', ended = ?, who = ?, why = ?"
        " WHERE id = ? AND state = 'open'",
        (now, who, how, number)).rowcount]


def alarm_ack(state, alarms, who, how, now):
    """alarms_take in a transaction: durable on return."""
    with state.change():
        return alarms_take(state, alarms, who, how, now)


def alarms_forget(state, before):
    """Drop alarms that were over by then.  Runs within a transaction."""
    state.db.execute(
        "DELETE FROM step WHERE alarm IN (SELECT id FROM alarm"
        " WHERE state = 'over' AND ended < ?)", (before,))
    state.db.execute("DELETE FROM alarm WHERE state = 'over' AND ended < ?",
                     (before,))
    state.db.execute('DELETE FROM notice WHERE next < ? AND id NOT IN (SELECT'
                     ' notice FROM step WHERE notice IS NOT NULL)', (before,))


def alarm_line(text):
    """Text as one line of characters that can be seen."""
    return ' '.join(''.join(c if c.isprintable() else ' '
                            for c in text).split())


##############################################################################
# Alarms: configuration
#
# Who may be told and how.  What is secret stands in a file of its own,
# `secrets` beside the state, which nobody else may read.
##############################################################################

WAYS = ('mail', 'sms', 'call')
NUMBER = r'\+[1-9][0-9]{6,14}'
ADDRESS = r'[^@\s<>,;"]+@[^@\s<>,;"]+'
SECRETS = ('twilio-token', 'mail-password')


class Person:
    """Who is told: name, {way: address}, hours of quiet, zone."""

    def __init__(self, text):
        self.name, *words = text.split() or ['']
        self.ways, self.quiet, self.zone = {}, None, None
        if not self.name or '=' in self.name:
            raise ValueError('a name comes first, then way=address')
        for word in words:
            name, _, value = word.partition('=')
            if name == 'mail' and value.isascii() and re.fullmatch(
                    ADDRESS, value):
                self.ways[name] = value
            elif name in ('sms', 'call') and re.fullmatch(NUMBER, value):
                self.ways[name] = value
            elif name == 'quiet':
                self.quiet = hours_parse(value)
            elif name == 'zone':
                import zoneinfo
                try:
                    self.zone = zoneinfo.ZoneInfo(value)
                except (ValueError, OSError, LookupError):
                    raise ValueError('no time zone %s' % value) from None
            else:
                raise ValueError('%s is not mail=ADDRESS, sms=+NUMBER, '
                                 'call=+NUMBER, quiet=HH:MM-HH:MM or '
                                 'zone=NAME' % word)

    def awake(self, now):
        """When the person may be woken: `now`, or the end of the quiet."""
        import datetime
        if self.quiet is None:
            return now
        first, last = self.quiet
        local = datetime.datetime.fromtimestamp(now, self.zone)
        minute = local.hour * 60 + local.minute
        inside = (first <= minute < last if first < last
                  else minute >= first or minute < last)
        if not inside:
            return now
        end = local.replace(hour=last // 60, minute=last % 60, second=0,
                            microsecond=0)
        if minute >= last:
            end += datetime.timedelta(days=1)
        return end.timestamp()


def hours_parse(text):
    """(first, last) minute of the day of HH:MM-HH:MM."""
    found = re.fullmatch(r'(\d\d?):(\d\d)-(\d\d?):(\d\d)', text)
    numbers = [int(number) for number in found.groups()] if found else [99]
    if not found or max(numbers[::2]) > 23 or max(numbers[1::2]) > 59:
        raise ValueError('%s is not HH:MM-HH:MM' % text)
    return numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]


def between(least, most):
    """A parser of numbers from `least` to `most`."""
    def parse(text):
        if not re.fullmatch(r'\d{1,6}', text) or not (
                least <= int(text) <= most):
            raise ValueError('%s is not a number from %d to %d' % (
                text, least, most))
        return int(text)
    return parse


def one_of(*words):
    """A parser of one of some words."""
    def parse(text):
        if text not in words:
            raise ValueError('%s is not one of %s' % (text, ', '.join(words)))
        return text
    return parse


def url_parse(text):
    """An https URL; on this machine itself http will do."""
    import urllib.parse
    parts = urllib.parse.urlsplit(text)
    if not parts.hostname or '@' in parts.netloc or parts.port == 0 or (
            parts.query or parts.fragment) or not (
            parts.scheme == 'https' or parts.scheme == 'http'
            and parts.hostname in ('localhost', '127.0.0.1', '::1')):
        raise ValueError('%s is not an https URL' % text)
    return text.rstrip('/')


def address_parse(text):
    """A mail address, with or without a name before it."""
    bare = re.search(r'<([^<>]*)>\Z', text)
    if not text.isascii() or not re.fullmatch(
            ADDRESS, bare.group(1) if bare else text):
        raise ValueError('%s is no mail address' % text)
    return text


def host_parse(text):
    """HOST or HOST:PORT."""
    if not re.fullmatch(r'[^:\s]+(:\d{1,5})?', text):
        raise ValueError('%s is not HOST or HOST:PORT' % text)
    return text


def number_parse(text):
    if not re.fullmatch(NUMBER, text):
        raise ValueError('%s is not a number like +15550100' % text)
    return text


ALARM_OPTIONS = {
    'person': (Person, []),                     # in the order they are told
    'alarm-minutes': (between(1, 1440), 10),    # from one step to the next
    'alarm-calls': (between(0, 20), 2),         # to each person, each round
    'alarm-rounds': (between(1, 20), 3),
    'alarm-sms': (one_of(*RANKS), WARNING),     # what is worth an SMS
    'alarm-call': (one_of(*RANKS), CRITICAL),   # what is worth a call
    'alarm-segments': (between(1, 6), 2),       # most parts of an SMS
    'alarm-url': (url_parse, None),             # where alarm.cgi is
    'mail-from': (address_parse, None),
    'mail-smtp': (host_parse, None),            # HOST or HOST:PORT
    'mail-tls': (one_of('starttls', 'tls', 'no'), 'starttls'),
    'mail-ca-bundle': (str, None),
    'mail-user': (str, None),
    'mail-sendmail': (str, '/usr/sbin/sendmail'),
    'twilio-account': (str, None),
    'twilio-number': (number_parse, None),      # ours
    'twilio-api': (url_parse, 'https://api.twilio.com'),
}


def secrets_read(state):
    """{name: value} of the file of secrets; Error if others can read it."""
    path = os.path.join(os.path.dirname(state.path), 'secrets')
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_mode & 0o077:
            raise Error('%s: others can read it; chmod 600' % path)
    return conf_read(path, [{name: (str, None) for name in SECRETS}])


def alarm_token(state, purpose, number):
    """What whoever answers notice `number` must know: 32 hex digits.

    Made from a secret that never leaves the state file, for one purpose.
    """
    import hmac
    found = state.db.execute('SELECT value FROM alarm_secret').fetchone()
    if found is None:
        with state.change():
            state.db.execute(
                'INSERT INTO alarm_secret SELECT ? WHERE NOT EXISTS'
                ' (SELECT * FROM alarm_secret)', (os.urandom(32),))
        found = state.db.execute('SELECT value FROM alarm_secret').fetchone()
    return hmac.digest(found[0], ('%s %d' % (purpose, number)).encode(),
                       'sha256')[:16].hex()


def alarm_url(state, conf, purpose, number):
    """The address at which `purpose` (l a link, k a key, s how a message
    fared) of notice `number` is answered; None if we can not be reached.
    """
    return conf['alarm-url'] and '%s?%s=%d.%s' % (
        conf['alarm-url'], purpose, number,
        alarm_token(state, purpose, number))


##############################################################################
# Alarms: texts
#
# What a person reads or hears.  An SMS is cut to the parts that were paid
# for: 160 of the letters of GSM 03.38 or 70 of UTF-16; of several, which need
# a header each, 153 or 67, and no letter of two is cut apart.
##############################################################################

GSM = set('@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !"#¤%&\'()*+,-./0123456789:;<=>?'
          '¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà')
GSM_TWO = set('\f^{}\\[~]|€')       # an escape and a letter
PLAIN = str.maketrans({'‘': "'", '’': "'", '“': '"', '”': '"', '–': '-',
                       '—': '-', '…': '...', '\xa0': ' ', '`': "'",
                       '\t': ' ', '•': '*', '«': '"', '»': '"'})


def sms_parts(text):
    """How many parts an SMS of that text has."""
    if all(c in GSM or c in GSM_TWO for c in text):
        widths, whole, part = [1 + (c in GSM_TWO) for c in text], 160, 153
    else:
        widths, whole, part = [1 + (c > '\uffff') for c in text], 70, 67
    if sum(widths) <= whole:
        return 1
    parts, room = 1, part
    for width in widths:
        if width > room:
            parts, room = parts + 1, part
        room -= width
    return parts


def sms_fit(text, tail, most):
    """`text`, cut if need be, and `tail` in at most `most` parts."""
    text, tail = alarm_line(text).translate(PLAIN), tail.translate(PLAIN)
    if sms_parts(text + tail) <= most:
        return text + tail
    low, high = 0, min(len(text), 160 * most)
    while low < high:
        middle = (low + high + 1) // 2
        if sms_parts(text[:middle].rstrip() + '...' + tail) <= most:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + '...' + tail


def alarms_headline(alarms):
    """What alarms are about, the worst first, in a line."""
    worst = max(alarms, key=lambda alarm: RANKS[alarm['severity']])
    more = len(alarms) - 1
    return '%s %s%s' % (
        worst['severity'].upper() if worst['state'] != 'over' else 'OVER',
        worst['title'], '' if not more else
        ' (and %d more alarm%s)' % (more, 's'[:more > 1]))


def sms_text(conf, notice, alarms):
    """The text of an SMS, with what to answer at its end."""
    tail = ' Reply ACK %s' % notice['code'] if (
        notice['kind'] == 'raise') else ''
    return sms_fit(alarms_headline(alarms), tail, conf['alarm-segments'])


def call_text(state, conf, notice, alarms):
    """TwiML: what a call says, twice, and the key that stops it."""
    from xml.sax.saxutils import escape, quoteattr
    spoken = escape(alarms_headline(alarms)[:400])
    url = alarm_url(state, conf, 'k', notice['id'])
    if url is None:
        return '<Response>%s</Response>' % (
            '<Say>Alarm. %s</Say><Pause length="1"/>' % spoken * 2)
    gather = ('<Gather numDigits="1" timeout="8" method="POST" action=%s>'
              '<Say>Alarm. %s. Press 1 to take care of it.</Say></Gather>'
              % (quoteattr(url), spoken))
    return ('<Response>%s<Say>No key was pressed.</Say></Response>'
            % (gather * 2))


def mail_text(state, conf, notice, alarms):
    """The EmailMessage of a notice.

    Its Message-ID is the same whenever it is sent again, and holds the
    finding's number and token, so that a reply to it can be told.
    """
    import email.message
    import email.policy
    import email.utils
    import socket
    sender = conf['mail-from'] or 'cronwatch@%s' % socket.getfqdn()
    message = email.message.EmailMessage(email.policy.SMTP)
    message['From'] = sender
    message['To'] = notice['address']
    message['Subject'] = alarms_headline(alarms)[:200]
    message['Date'] = email.utils.formatdate(notice['next'], localtime=True)
    message['Message-ID'] = '<cronwatch.%d.%s@%s>' % (
        notice['id'], '.'.join(
            [alarm_token(state, 'm', notice['id'])[:12]] + [
                '%d-%s' % (alarm['finding'], alarm['token'])
                for alarm in alarms[:4] if alarm['finding']]),
        sender.rpartition('@')[2].strip('>'))
    message['Auto-Submitted'] = 'auto-generated'
    message['X-Cronwatch'] = notice['kind']
    text = '\n\n'.join(mail_part(alarm) for alarm in alarms) + '\n'
    url = alarm_url(state, conf, 'l', notice['id'])
    if url and notice['kind'] == 'raise':
        text += '\nTo take care of it, so that nobody else is told:\n%s\n' % (
            url)
    message.set_content(text, cte='quoted-printable')
    return message


def mail_part(alarm):
    """What a mail says of one alarm."""
    lines = [alarm['title'], '%s alarm %d, since %s' % (
        alarm['severity'], alarm['id'], time.strftime(
            '%A %d %B, %H:%M', time.localtime(alarm['at'])))]
    if alarm['state'] == 'over':
        return '\n'.join(lines + ['over: %s' % alarm['why']])
    if alarm['body']:
        lines += ['', alarm['body'][:20000]]
    lines += ['', 'cronwatch ack %-8d I take care of it' % alarm['id']]
    if alarm['finding']:
        lines += ['cronwatch ok %-9d it is normal from now on'
                  % alarm['finding'],
                  'cronwatch bad %-8d it is not' % alarm['finding']]
    return '\n'.join(lines)


##############################################################################
# Alarms: ways out
#
# One function each for mail, SMS and call.  It returns when the thing has
# been taken, with the other side's name for it, or raises what may follow:
# Later (it was not taken), Unclear (it may have been), Refused (never).
# `seconds` is how long they wait for an answer.
##############################################################################


class Later(Exception):
    """It was not taken now; `seconds` to wait if the other side said so."""

    def __init__(self, text, seconds=0):
        super().__init__(text)
        self.seconds = seconds


class Unclear(Exception):
    """Nobody knows whether it was taken."""


class Refused(Exception):
    """It will not be taken; `code` is Twilio's number for why."""

    def __init__(self, text, code=None):
        super().__init__(text)
        self.code = code


def mail_send(state, conf, notice, alarms, seconds):
    """By SMTP, or by the local mail program where no server is given."""
    import subprocess
    message = mail_text(state, conf, notice, alarms)
    if conf['mail-smtp']:
        return smtp_send(state, conf, message, seconds)
    sender = message['From'].addresses[0].addr_spec
    try:
        done = subprocess.run(
            [conf['mail-sendmail'], '-i', '-f', sender, notice['address']],
            input=message.as_bytes(policy=message.policy.clone(linesep='\n')),
            capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Unclear('%s hangs' % conf['mail-sendmail']) from None
    except OSError as e:
        raise Later('%s: %s' % (conf['mail-sendmail'],
                                e.strerror or e)) from None
    if done.returncode:
        raise Later('%s: exit status %d' % (
            conf['mail-sendmail'], done.returncode))


def smtp_send(state, conf, message, seconds):
    """To the configured server, over TLS unless it says no."""
    import smtplib
    import ssl
    secure = ssl.create_default_context(cafile=conf['mail-ca-bundle'])
    host, _, port = conf['mail-smtp'].partition(':')
    port = int(port or {'starttls': 587, 'tls': 465, 'no': 25}[
        conf['mail-tls']])
    sent = False
    try:
        if conf['mail-tls'] == 'tls':
            server = smtplib.SMTP_SSL(host, port, timeout=seconds,
                                      context=secure)
        else:
            server = smtplib.SMTP(host, port, timeout=seconds)
        with contextlib.closing(server):
            if conf['mail-tls'] == 'starttls':
                server.starttls(context=secure)
            if conf['mail-user']:
                server.login(conf['mail-user'],
                             secrets_read(state)['mail-password'] or '')
            sent = True
            server.send_message(message)
    except smtplib.SMTPRecipientsRefused as e:
        (code, text), = e.recipients.values()
        raise (Refused if code >= 500 else Later)('%d %s' % (
            code, alarm_line(text.decode('utf-8', 'replace')))) from None
    except smtplib.SMTPResponseException as e:
        code, text = e.smtp_code, e.smtp_error
        text = text.decode('utf-8', 'replace') if isinstance(
            text, bytes) else str(text)
        lost = code >= 500 and isinstance(e, (
            smtplib.SMTPSenderRefused, smtplib.SMTPDataError))
        raise (Refused if lost else Later)('%d %s' % (
            code, alarm_line(text))) from None
    except (OSError, smtplib.SMTPException) as e:
        raise (Unclear if sent else Later)(alarm_line(str(e))) from None


def twilio_ask(state, conf, seconds, path, form=None):
    """The JSON that Twilio answers to a form, or to a question."""
    import base64
    import http.client
    import json
    import urllib.error
    import urllib.parse
    import urllib.request
    secret = secrets_read(state)['twilio-token']
    if not (conf['twilio-account'] and conf['twilio-number'] and secret):
        raise Later('twilio-account, twilio-number or the secret '
                    'twilio-token is not configured')
    request = urllib.request.Request(
        '%s/2010-04-01/Accounts/%s/%s' % (
            conf['twilio-api'], conf['twilio-account'], path),
        None if form is None else urllib.parse.urlencode(form).encode(),
        {'Authorization': 'Basic ' + base64.b64encode(('%s:%s' % (
            conf['twilio-account'], secret)).encode()).decode()})

    class Stay(urllib.request.HTTPRedirectHandler):
        """Nobody else is to see the token."""

        def redirect_request(self, *_):
            return None

    try:
        with urllib.request.build_opener(Stay).open(
                request, timeout=seconds) as answer:
            return json.loads(answer.read(10 ** 7))
    except urllib.error.HTTPError as e:
        with e:
            raise twilio_fault(e) from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        reason = getattr(e, 'reason', e)
        raise (Later if unsent(reason) else Unclear)(alarm_line(
            '%s %s' % (type(reason).__name__, reason))) from None


def unsent(fault):
    """True if nothing can have been sent, since there was no connection."""
    import errno
    import socket
    import ssl
    return isinstance(fault, (
        ConnectionRefusedError, socket.gaierror,
        ssl.SSLCertVerificationError)) or getattr(fault, 'errno', 0) in (
            errno.ENETUNREACH, errno.EHOSTUNREACH)


def twilio_fault(error):
    """What to make of an HTTPError: Later, Unclear or Refused."""
    import http.client
    import json
    code, text = None, error.reason
    try:
        found = json.loads(error.read(10 ** 5))
        code, text = found['code'], found['message']
    except (OSError, ValueError, LookupError, TypeError,
            http.client.HTTPException):
        pass
    text = alarm_line('%d %s %s' % (error.code, code or '', text))[:300]
    if error.code >= 500:
        return Unclear(text)
    if error.code == 429:
        wait = error.headers.get('Retry-After', '')
        return Later(text, min(int(wait), 600) if wait.isdigit() else 0)
    # Who we are can be mended, whom we call and what we say can not.
    return Later(text) if error.code < 400 or error.code in (
        401, 403, 404, 407, 408) else Refused(text, code)


def twilio_send(state, conf, notice, alarms, seconds):
    """An SMS or a call; Twilio's name for it."""
    form = {'To': notice['address'], 'From': conf['twilio-number']}
    url = alarm_url(state, conf, 's', notice['id'])
    if url:
        form['StatusCallback'] = url
    if notice['way'] == 'sms':
        form['Body'] = notice['text']
        found = twilio_ask(state, conf, seconds, 'Messages.json', form)
    else:
        form['Twiml'] = call_text(state, conf, notice, alarms)
        form['Timeout'] = '30'
        found = twilio_ask(state, conf, seconds, 'Calls.json', form)
    return str(found.get('sid', ''))


def twilio_find(state, conf, notice, seconds):
    """Twilio's name for a notice that it may have taken, or None.

    An SMS is known by its text, in which the code is.  A call can only be
    known by whom it went to and when: it is one of ours that we have not
    heard of yet, and there is at most one, since nobody is called anew before
    the last one is clear.
    """
    import email.utils
    import urllib.parse
    kind = 'Messages' if notice['way'] == 'sms' else 'Calls'
    found = twilio_ask(state, conf, seconds, '%s.json?%s' % (
        kind, urllib.parse.urlencode({'To': notice['address'],
                                      'From': conf['twilio-number'],
                                      'PageSize': 100})))
    for one in found[kind.lower()]:
        made = email.utils.parsedate_to_datetime(one['date_created'])
        if (one['direction'].startswith('outbound')
                and made.timestamp() > notice['tried'] - CLOCK_SECONDS
                and (kind == 'Calls' or letters(one['body'])
                     == letters(notice['text']))
                and not state.db.execute('SELECT * FROM notice WHERE sid = ?',
                                         (one['sid'],)).fetchone()):
            return one['sid']
    return None


def letters(text):
    """What no gateway changes of a text."""
    return [c for c in text or '' if c.isalnum()]


SENDERS = {'mail': mail_send, 'sms': twilio_send, 'call': twilio_send}

##############################################################################
# Alarms: escalation
#
# One process at a time, who holds a lock that the kernel takes back from the
# dead.  What it is about to send is written down first.  What is found
# `trying` under the lock was begun by somebody who died, or nobody knows what
# became of it: it is sent again only if Twilio, asked a while later, does not
# know it.
#
# What remains: a message that Twilio took but lists only after SETTLE seconds
# goes out twice, and so does a mail whose server was lost between taking it
# and saying so, with the same Message-ID.
##############################################################################

SETTLE = 60                 # seconds after which Twilio lists what it took
CLOCK_SECONDS = 300         # Twilio's clock may be that far behind ours
TRIES = 9                   # the last about half an hour after the first
SEND_SECONDS = 30           # to wait for an answer
# The same while somebody waits for us, and after which nothing more is begun.
HURRY_SECONDS, HURRY_TOTAL = 5, 10


def alarms_send(state, conf, now, complain=lambda line: None, hurry=False):
    """Send what is due.  Called after each delivery and check, outside of any
    transaction; never raises for what a network or a mail program does.
    `complain` is told of what failed, in lines.

    In a `hurry` a mail server or Twilio that failed once is not tried again,
    and what is left is for the next one who calls this.
    """
    import fcntl
    if not alarms_due(state, now):
        return
    with contextlib.ExitStack() as stack:
        lock = os.open(os.path.join(os.path.dirname(state.path),
                                    'alarms.lock'),
                       os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return                      # somebody is at it
        seen, dead, begun = set(), set(), time.monotonic()
        while not hurry or time.monotonic() < begun + HURRY_TOTAL:
            alarms_fold(state, conf, now)
            # Which fails again and again comes after the others.
            notice = state.db.execute(
                "SELECT * FROM notice WHERE state IN ('ready', 'trying')"
                " AND next <= ? AND id NOT IN (%s) AND (way = 'mail') NOT IN"
                " (%s) ORDER BY way = 'mail', tries, id" % (
                    ','.join(map(str, seen)), ','.join(map(str, dead))),
                (now,)).fetchone()
            if notice is None:
                return
            seen.add(notice['id'])
            try:
                if not notice_do(
                        state, conf, notice, now, complain,
                        HURRY_SECONDS if hurry else SEND_SECONDS) and hurry:
                    dead.add(int(notice['way'] == 'mail'))
            # A fault of ours must not keep the others from being told.
            except Exception as e:
                complain('%s to %s: %s: %s' % (
                    notice['way'], notice['person'], type(e).__name__, e))
                notice_again(state, notice, now, Unclear(str(e)))


def alarms_due(state, now):
    """True if alarms_send may have something to do."""
    return any(state.db.execute(text, {'now': now}).fetchone() for text in (
        "SELECT * FROM alarm WHERE state = 'open' AND planned = 0",
        "SELECT * FROM notice WHERE state IN ('ready', 'trying')"
        " AND next <= :now",
        "SELECT * FROM alarm JOIN step ON step.alarm = alarm.id"
        " WHERE state = 'open' AND notice IS NULL AND base + after <= :now",
        "SELECT * FROM step JOIN alarm ON alarm.id = step.alarm"
        " WHERE step.kind = 'over' AND notice IS NULL"))


def alarms_fold(state, conf, now):
    """Turn what is due into notices, one for each person and way."""
    with state.change():
        for alarm in state.db.execute(
                "SELECT * FROM alarm WHERE planned = 0"
                " AND state = 'open'").fetchall():
            alarms_forget(state, now - 400 * 86400)
            alarm_plan(state, conf, alarm)
        due = {}
        for alarm in state.db.execute(
                "SELECT DISTINCT alarm.* FROM alarm JOIN step ON step.alarm ="
                " alarm.id AND step.notice IS NULL WHERE base + after <= ?"
                " AND (kind = 'raise' AND state = 'open'"
                " OR kind = 'over' AND state = 'over') ORDER BY alarm.id",
                (now,)).fetchall():
            for step in steps_due(state, conf, alarm, now):
                due.setdefault((step['kind'], step['person'], step['way']),
                               []).append(step)
        for key, steps in due.items():
            notice_make(state, conf, *key, steps, now)


def alarm_plan(state, conf, alarm):
    """Write the steps of an alarm."""
    rank, seconds = RANKS[alarm['severity']], 60 * conf['alarm-minutes']
    ways = [way for way in ('sms', 'mail')
            if way == 'mail' or rank >= RANKS[conf['alarm-sms']]]
    calls = conf['alarm-calls'] * (rank >= RANKS[conf['alarm-call']])
    people = conf['person'] if rank else conf['person'][:1]
    rows, after = [], 0
    for number in range(conf['alarm-rounds'] if calls else 1):
        for person in people:
            told = [way for way in ways if way in person.ways]
            rows += [(after, person.name, way) for way in told]
            after += seconds * bool(told)
            for _ in range(calls if 'call' in person.ways else 0):
                rows.append((after, person.name, 'call'))
                after += seconds
    state.db.executemany(
        "INSERT INTO step(alarm, kind, after, person, way)"
        " VALUES (%d, 'raise', ?, ?, ?)" % alarm['id'], rows)
    state.db.execute('UPDATE alarm SET planned = 1 WHERE id = ?',
                     (alarm['id'],))


def steps_due(state, conf, alarm, now):
    """The next steps of an alarm, of one moment, that go out now.

    If that is later than it was meant, all that follows is later, too: who
    was asleep gets no SMS and calls all at once.
    """
    kind = 'over' if alarm['state'] == 'over' else 'raise'
    people = {person.name: person for person in conf['person']}
    going, moment, wake = [], None, now
    for step in state.db.execute(
            'SELECT * FROM step WHERE alarm = ? AND kind = ? AND notice'
            ' IS NULL AND after <= ? ORDER BY after, id',
            (alarm['id'], kind, now - alarm['base'])).fetchall():
        person = people.get(step['person'])
        if person is None or step['way'] not in person.ways:
            state.db.execute('DELETE FROM step WHERE id = ?', (step['id'],))
        elif state.db.execute(
                "SELECT * FROM notice WHERE person = ? AND way = ? AND"
                " state = 'trying'", (step['person'], step['way'])
                ).fetchone():
            pass                # until that is clear, or it is overtaken
        elif moment in (None, step['after']):
            moment = step['after']
            if step['way'] == 'mail' or (
                    kind == 'raise' and alarm['severity'] == CRITICAL):
                going.append(step)
            elif person.awake(now) > now:
                wake = max(wake, person.awake(now))
            else:
                going.append(step)
    if moment is not None:
        state.db.execute('DELETE FROM step WHERE alarm = ? AND kind = ? AND'
                         ' notice IS NULL AND after < ?',
                         (alarm['id'], kind, moment))
        state.db.execute('UPDATE alarm SET base = ? WHERE id = ?',
                         (wake - moment, alarm['id']))
    return going


def notice_make(state, conf, kind, person, way, steps, now):
    """The notice of steps to one person in one way: one that could not be
    sent yet, or a new one.  Runs within a transaction.
    """
    import secrets
    number, = state.db.execute(
        "SELECT max(id) FROM notice WHERE kind = ? AND person = ? AND way = ?"
        " AND state = 'ready'", (kind, person, way)).fetchone()
    if number is None:
        taken = {code for code, in state.db.execute(
            'SELECT code FROM notice WHERE next > ?', (now - 14 * 86400,))}
        code = None
        while code is None or code in taken:
            code = '%04d' % secrets.randbelow(10000)
        address, = [one.ways[way] for one in conf['person']
                    if one.name == person]
        number = state.db.execute(
            'INSERT INTO notice(kind, person, way, address, code, next)'
            ' VALUES (?, ?, ?, ?, ?, ?)',
            (kind, person, way, address, code, now)).lastrowid
    state.db.executemany('UPDATE step SET notice = %d WHERE id = ?' % number,
                         [(step['id'],) for step in steps])


def notice_alarms(state, number):
    """The alarms that a notice is about."""
    return state.db.execute(
        'SELECT DISTINCT alarm.*, finding.token FROM alarm JOIN step'
        ' ON step.alarm = alarm.id LEFT JOIN finding'
        ' ON finding.id = alarm.finding WHERE step.notice = ?'
        ' ORDER BY alarm.id', (number,)).fetchall()


def notice_do(state, conf, notice, now, complain, seconds):
    """One try to bring a notice to its end; False if who was to take it did
    not say yes or no.
    """
    try:
        if notice['state'] == 'trying' and notice_settle(
                state, conf, notice, now, seconds):
            return True
        if notice['tries'] >= TRIES:
            raise Refused(notice['said'] or 'it comes to nothing')
        # Who has answered meanwhile is not told.
        want = 'open' if notice['kind'] == 'raise' else 'over'
        alarms = [alarm for alarm in notice_alarms(state, notice['id'])
                  if alarm['state'] == want]
        if not alarms:
            notice_end(state, notice, now, 'dropped')
            return True
        if notice['way'] == 'sms' and state.db.execute(
                'SELECT * FROM stopped WHERE number = ?',
                (notice['address'],)).fetchone():
            raise Refused('the number said STOP')
        notice = notice_try(state, conf, notice, alarms, now)
        sid = SENDERS[notice['way']](state, conf, notice, alarms, seconds)
        notice_end(state, notice, now, 'sent', sid)
    except Refused as e:
        if e.code == 21610:
            number_stop(state, notice['address'], now)
        notice_end(state, notice, now, 'failed', said=str(e))
        complain('%s to %s: %s' % (notice['way'], notice['person'], e))
    except (Later, Unclear, Error) as e:
        notice_again(state, notice, now, e)
        complain('%s to %s: %s' % (notice['way'], notice['person'], e))
        return False
    return True


def notice_settle(state, conf, notice, now, seconds):
    """Find out what became of a try; False if nothing did."""
    if notice['way'] == 'mail':
        return False
    try:
        sid = twilio_find(state, conf, notice, seconds)
    except (Later, Unclear, Refused, Error) as e:
        raise Unclear(str(e)) from None
    if sid:
        notice_end(state, notice, now, 'sent', sid)
    elif now < notice['tried'] + SETTLE:
        notice_wait(state, notice, notice['tried'] + SETTLE)
    else:
        return False
    return True


def notice_try(state, conf, notice, alarms, now):
    """Write down that a notice is about to be sent; the notice then."""
    text = sms_text(conf, notice, alarms) if notice['way'] == 'sms' else ''
    with state.change():
        state.db.execute(
            "UPDATE notice SET state = 'trying', tries = tries + 1,"
            " tried = ?, text = ? WHERE id = ?", (now, text, notice['id']))
    return state.db.execute('SELECT * FROM notice WHERE id = ?',
                            (notice['id'],)).fetchone()


def notice_wait(state, notice, until):
    """Nothing is to be done for a notice before `until`."""
    with state.change():
        state.db.execute('UPDATE notice SET next = ? WHERE id = ?',
                         (until, notice['id']))


def notice_again(state, notice, now, fault):
    """A notice was not taken, or nobody knows: when to look at it again."""
    if notice['tries'] >= TRIES and not isinstance(fault, Unclear):
        return notice_end(state, notice, now, 'failed', said=str(fault))
    wait = max(min(600, 5 * 2 ** notice['tries']),
               getattr(fault, 'seconds', 0))
    unclear = isinstance(fault, Unclear)
    with state.change():
        state.db.execute(
            'UPDATE notice SET state = ?, next = ?, said = ? WHERE id = ?',
            ('trying' if unclear else 'ready', now + wait,
             str(fault), notice['id']))


def notice_end(state, notice, now, end, sid=None, said=None):
    """A notice has come to its end; where it failed, the next step is due."""
    with state.change():
        state.db.execute(
            'UPDATE notice SET state = ?, sid = coalesce(?, sid), said = ?'
            ' WHERE id = ?', (end, sid, said, notice['id']))
        for alarm in notice_alarms(state, notice['id']):
            if end == 'sent' and notice['kind'] == 'raise':
                alarm_tell_over(state, alarm['id'])
            elif end == 'failed' and notice['kind'] == 'raise':
                alarm_hurry(state, alarm, notice['way'], now)


def alarm_hurry(state, alarm, way, now):
    """Somebody could not be told: what comes next comes now.

    A mail wakes nobody, so it only matters if nothing else was sent.
    """
    if way == 'mail' and state.db.execute(
            "SELECT * FROM step JOIN notice ON notice.id = step.notice"
            " WHERE alarm = ? AND notice.way != 'mail'"
            " AND state IN ('ready', 'trying', 'sent')",
            (alarm['id'],)).fetchone():
        return
    state.db.execute(
        "UPDATE alarm SET base = min(base, ? - (SELECT min(after) FROM step"
        " WHERE alarm = alarm.id AND kind = 'raise' AND notice IS NULL))"
        " WHERE id = ? AND state = 'open' AND EXISTS (SELECT * FROM step"
        " WHERE alarm = alarm.id AND kind = 'raise' AND notice IS NULL)",
        (now, alarm['id']))


def number_stop(state, number, now):
    """No SMS may go to `number` any more."""
    with state.change():
        state.db.execute('INSERT OR IGNORE INTO stopped VALUES (?, ?)',
                         (number, now))


##############################################################################
# Alarms: answers
#
# What comes back over the web, through any CGI server: alarm.cgi.  Everything
# but the links in mails must be signed by Twilio; whatever is not as it should
# be gets one and the same refusal.  The public address is that of the
# configuration: what a front makes of host and scheme is not believed.
##############################################################################

ANSWER_MOST = 65536         # bytes of a form; an SMS has 1600 letters at most
STOP_WORDS = {'STOP', 'STOPALL', 'UNSUBSCRIBE', 'CANCEL', 'END', 'QUIT',
              'REVOKE', 'OPTOUT'}
START_WORDS = {'START', 'YES', 'UNSTOP'}
ACK_WORDS = {'ACK', 'OK', 'MINE'}
DEAD_STATUS = {'failed', 'undelivered'}

PAGE = '''\
<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Alarm</title>
%s
</html>
'''
PAGE_HEAD = '''\
Content-Type: text/html; charset=utf-8
Content-Security-Policy: default-src 'none'; form-action 'self'; \
frame-ancestors 'none'; base-uri 'none'
Referrer-Policy: no-referrer
'''
TWIML_HEAD = 'Content-Type: text/xml; charset=utf-8\n'


class Forbidden(Exception):
    """Not said why, to nobody."""


def twilio_signature(secret, url, form):
    """X-Twilio-Signature for a form that is posted to `url`.

    https://www.twilio.com/docs/usage/security: the URL, then each name and
    value once, sorted by name and value, nothing between them.
    """
    import base64
    import hmac
    text = url + ''.join(name + value for name, value in sorted(set(form)))
    return base64.b64encode(hmac.digest(
        secret.encode(), text.encode(), 'sha1')).decode()


def twilio_urls(url):
    """`url` with its port and without it: Twilio signs either."""
    import urllib.parse
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc
    bare = host[:-len(':%d' % parts.port)] if parts.port else host
    port = parts.port or {'https': 443, 'http': 80}[parts.scheme]
    return [parts._replace(netloc=name).geturl()
            for name in (bare, '%s:%d' % (bare, port))]


def twilio_form(state, conf, environ, stdin):
    """The form that Twilio posted, a list of pairs; Forbidden if another."""
    import hmac
    import urllib.parse
    length = environ.get('CONTENT_LENGTH') or ''
    secret = secrets_read(state)['twilio-token']
    given = environ.get('HTTP_X_TWILIO_SIGNATURE', '')
    if (environ.get('REQUEST_METHOD') != 'POST' or not secret
            or not length.isdecimal() or len(length) > 5
            or int(length) > ANSWER_MOST or not environ.get(
                'CONTENT_TYPE', '').startswith(
                'application/x-www-form-urlencoded')):
        raise Forbidden
    try:
        form = urllib.parse.parse_qsl(
            stdin.read(int(length)).decode('ascii'), keep_blank_values=True,
            errors='strict', max_num_fields=200)
    except ValueError:
        raise Forbidden from None
    url, query = conf['alarm-url'], environ.get('QUERY_STRING', '')
    good = [hmac.compare_digest(
        twilio_signature(secret, one, form).encode(), given.encode())
        for one in twilio_urls(url + '?' * bool(query) + query)]
    values = dict(form)
    if not any(good) or values.get('AccountSid') != conf['twilio-account']:
        raise Forbidden
    return values


def alarm_answer(state, conf, environ, stdin, now):
    """(head, body) of the answer to a CGI request.

    Durable when it returns: an answer that was acknowledged stays so.
    """
    import hmac
    query = environ.get('QUERY_STRING', '')
    found = re.fullmatch(r'([kls])=(\d{1,12})\.([0-9a-f]{32})', query)
    if not conf['alarm-url'] or query and not found:
        raise Forbidden
    if not found:
        return sms_answer(state, conf, twilio_form(
            state, conf, environ, stdin), now)
    purpose, number, token = found.groups()
    notice = state.db.execute('SELECT * FROM notice WHERE id = ?',
                              (int(number),)).fetchone()
    if not hmac.compare_digest(alarm_token(
            state, purpose, int(number)), token) or notice is None:
        raise Forbidden
    if purpose == 'l':
        return link_answer(state, environ, notice, now)
    form = twilio_form(state, conf, environ, stdin)
    if form.get('To') != notice['address']:
        raise Forbidden
    if purpose == 'k':
        return key_answer(state, conf, notice, form, now)
    return status_answer(state, notice, form, now)


def twiml(verb='', text=''):
    """An answer that makes Twilio say or send something, or nothing."""
    from xml.sax.saxutils import escape
    inside = verb and '<%s>%s</%s>' % (verb, escape(text), verb)
    return TWIML_HEAD, ('<?xml version="1.0" encoding="UTF-8"?>'
                        '<Response>%s</Response>' % inside)


def sms_answer(state, conf, form, now):
    """Somebody sent an SMS; who is unknown gets no answer.

    What answers by itself must not be answered: so only what was understood
    is.
    """
    sender, text = form.get('From'), form.get('Body', '').upper()
    names = [person.name for person in conf['person'] if sender in (
        person.ways.get('sms'), person.ways.get('call'))]
    if not names or form.get('To') != conf['twilio-number']:
        return twiml()
    words, optout = re.findall(r'\w+', text), form.get('OptOutType')
    with state.change():
        if not state.db.execute(
                'INSERT OR IGNORE INTO heard VALUES (?, ?)',
                (form.get('MessageSid'), now)).rowcount:
            return twiml()              # a replay
        state.db.execute('DELETE FROM heard WHERE at < ?', (now - 90 * 86400,))
        if optout == 'STOP' or words[:1] and words[0] in STOP_WORDS:
            state.db.execute('INSERT OR IGNORE INTO stopped VALUES (?, ?)',
                             (sender, now))
            return twiml()
        if optout == 'START' or words[:1] and words[0] in START_WORDS:
            state.db.execute('DELETE FROM stopped WHERE number = ?', (sender,))
            return twiml()
        codes = [word for word in words if re.fullmatch('[0-9]{4}', word)]
        if not codes and not (words and words[0] in ACK_WORDS):
            return twiml()
        alarms = [alarm for notice in state.db.execute(
            "SELECT * FROM notice WHERE kind = 'raise' AND person IN (%s)"
            % ', '.join('?' * len(names)), names).fetchall()
            if not codes or notice['code'] in codes
            for alarm in notice_alarms(state, notice['id'])]
        taken = alarms_take(state, [alarm['id'] for alarm in alarms],
                            names[0], 'SMS', now)
    told = [alarm for alarm in alarms if alarm['id'] in taken] or (
        alarms[-1:] if codes else [])
    return twiml('Message', sms_fit(
        'Yours: ' + ', '.join(sorted({alarm['title'] for alarm in told}))
        if told else 'No such alarm is open.', '', 1))


def key_answer(state, conf, notice, form, now):
    """Somebody pressed a key while we called."""
    if notice['way'] != 'call' or notice['sid'] not in (
            None, form.get('CallSid')):
        raise Forbidden
    alarms = notice_alarms(state, notice['id'])
    if form.get('Digits') != '1':
        return TWIML_HEAD, call_text(state, conf, notice, alarms)
    alarm_ack(state, [alarm['id'] for alarm in alarms], notice['person'],
              'phone', now)
    return twiml('Say', 'Thank you. It is yours. Good bye.')


def status_answer(state, notice, form, now):
    """Twilio tells what became of a message or a call.

    It may tell before its answer to our request has come, and where that is
    lost.
    """
    name = 'MessageS' if notice['way'] == 'sms' else 'CallS'
    sid, status = form.get(name + 'id'), form.get(name + 'tatus')
    if not sid or not status or notice['sid'] not in (None, sid):
        raise Forbidden
    code = form.get('ErrorCode', '')
    if code == '21610':
        number_stop(state, notice['address'], now)
    if status in DEAD_STATUS:
        if notice['state'] != 'failed':
            notice_end(state, notice, now, 'failed', sid, ' '.join(
                ['Twilio:', status, code]).strip())
    elif notice['state'] == 'trying':
        notice_end(state, notice, now, 'sent', sid)
    return twiml()


def link_answer(state, environ, notice, now):
    """The link in a mail.  Programs follow links: only its button counts."""
    from html import escape
    alarms = notice_alarms(state, notice['id'])
    method = environ.get('REQUEST_METHOD')
    if method == 'POST':
        alarm_ack(state, [alarm['id'] for alarm in alarms], notice['person'],
                  'link', now)
        alarms = notice_alarms(state, notice['id'])
    elif method not in ('GET', 'HEAD'):
        raise Forbidden
    lines = ['<h1>%s</h1>' % escape(alarm['title']) + (
        '' if alarm['state'] == 'open' else '<p>%s' % escape(
            'It is over: %s' % alarm['why'] if alarm['state'] == 'over' else
            '%s takes care of it.' % alarm['who'])) for alarm in alarms]
    if any(alarm['state'] == 'open' for alarm in alarms):
        lines.append('<form method="post"><button>I take care of it</button>'
                     '</form>')
    return PAGE_HEAD, PAGE % '\n'.join(lines)


##############################################################################
# Watch
#
# A mail from its arrival to its alarm, and what people say of it.
##############################################################################


class Watch:
    """The whole of it on one state file, for programs.

    `conf` is what conf_read gives, `clock` tells the time where none is given.
    """

    def __init__(self, path, conf=None, clock=time.time):
        self.state = State(path)
        self.conf = conf_read(os.devnull, OPTIONS) if conf is None else conf
        self.clock = clock
        self._words = None

    def deliver(self, raw, now=None, size=None, beyond=0):
        """Judge and learn the mail `raw`; the list of Findings to be told.

        `raw` may be the beginning of a mail of `size` bytes with `beyond`
        line ends more.  Durable on return.  A reply to an alarm is obeyed.
        None for a mail of ours, which is not judged.
        """
        now = self.clock() if now is None else now
        size = len(raw) if size is None else size
        if len(raw) > HEAD_BYTES:
            beyond += raw.count(b'\n', HEAD_BYTES)
            raw = raw[:HEAD_BYTES]
        message = mail_parse(raw)
        if message.get('X-Cronwatch') in ('raise', 'over'):
            return None
        if self.reply(message, now):
            return []
        return self.take(mail_run(message, now, size, beyond))

    def learn(self, raw, at):
        """Learn a mail of the past; True if it is not older than known."""
        run = mail_read(raw, at)
        row = self.state.job(run.key)
        if row is not None and run.at <= row['seen']:
            return False
        self.take(run, tell=False)
        return True

    def take(self, run, tell=True):
        """Judge and learn a Run; the list of Findings to be told."""
        if self._words is None:
            self._words = Words()
        state = self.state
        with state.change():
            row = state.job(run.key)
            memory, miner = state.memory(row)
            if memory.at:
                run.at = max(run.at, memory.at[-1] + 0.001)
            observed = Observed(run, miner, self._words)
            memory.follow(miner)
            evidence = Judge(memory, miner, observed, self._words).judge()
            for one in evidence:
                one.run = memory.n
            fresh = self._open_go_on(memory, run, evidence)
            run_learn(memory, observed, evidence)
            self._persist(memory, run)
            number = state.job_keep(row, run, memory, miner, run.at)
            finding = self._found(number, memory, run, fresh)
            state.mail_add(number, run, finding.id if finding else None)
            if finding is not None:
                state.memory_keep(number, memory)
                if tell and finding.severity != NOTICE:
                    raise_alarm(state, finding, run.at)
        if finding is None or finding.severity == NOTICE or not tell:
            return []
        return [finding]

    def _found(self, job, memory, run, fresh):
        """Keep what is new of the evidence as one Finding; it or None."""
        if not fresh:
            return None
        loud = [one for one in fresh if one.severity != NOTICE]
        finding = self.state.finding_add(
            job, run.at, loud or fresh, None if loud else run.at)
        if loud:
            memory.open[str(finding.id)] = {
                'since': memory.n - 1, 'at': run.at,
                'strong': any(one.kind == 'status' or one.weight > 70
                              for one in loud),
                # One line came instead of another one.
                'instead': sum(one.kind == 'missing line' for one in loud)
                <= min(2, sum(one.kind == 'new line' for one in fresh)),
                'held': {one.cause: [[one.run, one.held]] for one in loud}}
            for one in loud:
                memory.told.setdefault(one.cause, []).append(run.at)
        return finding

    def _open_go_on(self, memory, run, evidence):
        """What the run says of open findings; the evidence that is new."""
        present = {one.cause: one for one in evidence
                   if one.severity != NOTICE}
        covered = set()
        for name, entry in list(memory.open.items()):
            if 'absent' in entry['held']:
                # Once is an accident.
                if len(memory.told.get('absent', ())) < 2:
                    memory.gone.append(memory.n)
                self._end(memory, name, run.at, 'it came after all, after %s'
                          % period(run.at - memory.at[-1]))
                continue
            still = [cause for cause in entry['held'] if cause in present]
            if not still:
                self._recovered(memory, name, entry, run)
                continue
            kinds = {present[cause].kind for cause in still}
            if 'missing line' in kinds or 'length' in kinds:
                covered |= {one.cause for one in evidence
                            if one.kind in ('missing line', 'order')}
            for cause in still:
                covered.add(cause)
                entry['held'][cause].append(
                    [memory.n, present[cause].held])
        return [one for one in evidence if one.cause not in covered]

    def _recovered(self, memory, name, entry, run):
        """A run without any of a finding's causes.  What is harmless, or was
        told again and again and nobody minded, is normal from now on.
        """
        for cause, held in entry['held'].items():
            often = len(memory.told.get(cause, ())) >= 3
            harmless = not entry['strong'] and (
                cause.startswith(('new ', 'text '))
                or cause.startswith('missing ') and entry['instead'])
            if (often or harmless) and cause not in memory.bad:
                cause_learn(memory, cause, held)
        self._end(memory, name, run.at, 'as usual again')

    def _persist(self, memory, run):
        """What has been so for long is normal from now on."""
        for name, entry in list(memory.open.items()):
            if memory.n - entry['since'] < ADOPT_RUNS or entry['strong'] \
                    or run.at - entry['at'] < ADOPT_SECONDS:
                continue
            if any(cause in memory.bad for cause in entry['held']):
                continue
            for cause, held in entry['held'].items():
                cause_learn(memory, cause, held)
            self._end(memory, name, run.at, 'it has been so for %d mails and '
                      'is taken as normal now' % (memory.n - entry['since']))

    def _end(self, memory, name, now, why):
        del memory.open[name]
        self.state.finding_end(int(name), now)
        end_alarm(self.state, self.state.finding(int(name)), now, why)

    def check(self, now=None):
        """The list of Findings of mails that did not come by `now`.

        If many jobs are silent at once, there is one for all of them: it is
        the machine, or its mail.
        """
        now = self.clock() if now is None else now
        state, findings = self.state, []
        with state.change():
            rows = state.db.execute(
                'SELECT * FROM job WHERE due < ? ORDER BY due',
                (now,)).fetchall()
            many = len(rows) >= 4
            for row in rows:
                finding = self._absent(row, rows if many else [row], now)
                if not many or not findings:
                    raise_alarm(state, finding, now)
                    findings.append(finding)
            if rows:
                state.forget(now)
        return findings

    def _absent(self, row, rows, now):
        """Keep the finding that a job's mail did not come."""
        memory, _ = self.state.memory(row)
        reason = 'no mail since %s; usually one comes after %s' % (
            time.strftime('%a %H:%M, %d %b', time.localtime(row['seen'])),
            period(row['usual']))
        lines = []
        if len(rows) > 1:
            reason = '%d jobs sent no mail, as %s: is it the machine, or ' \
                'its mail?' % (len(rows), quoted(row['name'], 60))
            lines = [(None, one['name']) for one in rows]
        one = Evidence('absent', 'absent', WARNING, 95, reason, lines)
        one.run = memory.n
        finding = self.state.finding_add(row['id'], now, [one])
        memory.open[str(finding.id)] = {
            'since': memory.n, 'at': now, 'strong': True, 'instead': False,
            'held': {'absent': [[memory.n, None]]}}
        memory.told.setdefault('absent', []).append(now)
        self.state.memory_keep(row['id'], memory)
        self.state.db.execute('UPDATE job SET due = NULL WHERE id = ?',
                              (row['id'],))
        return finding

    def ok(self, number, now=None):
        """What finding `number` is about is normal from now on."""
        now = self.clock() if now is None else now
        with self.state.change():
            row, memory, causes = self._causes(number)
            for cause, held in causes.items():
                if cause == 'absent':
                    memory.patience = max(memory.patience, 1.2 * (
                        now - row['seen']) / max(row['usual'] or DAY, 60))
                else:
                    cause_learn(memory, cause, held)
                memory.told.pop(cause, None)
                if cause in memory.bad:
                    memory.bad.remove(cause)
            if str(number) in memory.open:
                self._end(memory, str(number), now, 'somebody said that it '
                          'is normal')
            self.state.memory_keep(row['id'], memory)

    def bad(self, number, now=None):
        """Finding `number` was right: never learn this as normal."""
        with self.state.change():
            row, memory, causes = self._causes(number)
            for cause, held in causes.items():
                cause_unlearn(memory, cause, held)
                if cause not in memory.bad:
                    memory.bad.append(cause)
            self.state.memory_keep(row['id'], memory)

    def _causes(self, number):
        """(job's row, Memory, {cause: held}) of a finding."""
        import json
        found = self.state.finding_row(number)
        row = self.state.db.execute('SELECT * FROM job WHERE id = ?',
                                    (found['job'],)).fetchone()
        memory, _ = self.state.memory(row)
        causes = json.loads(found['causes'])
        if str(number) in memory.open:
            causes.update(memory.open[str(number)]['held'])
        return row, memory, causes

    def reply(self, message, now):
        """Obey a reply to the mail of an alarm: ok or bad as its first word.
        True if it was one.  Who replies proves himself by the token in the
        Message-ID, which only those know who got the alarm.
        """
        named = '%s %s' % (message.get('In-Reply-To', ''),
                           message.get('References', ''))
        if '<cronwatch.' not in named:
            return False
        named = ' '.join(re.findall(r'<cronwatch\.[^<>\s]*>', named))
        for number, token in re.findall(r'\b(\d{1,18})-([0-9a-f]{16})\b',
                                        named):
            try:
                finding = self.state.finding(int(number))
            except Error:
                continue
            if finding.token != token:
                continue
            lines, _ = text_lines(message_text(message))
            word = lines[0][1].split()[0].lower().strip('.,!') \
                if lines else ''
            if word == 'ok':
                self.ok(finding.id, now)
            elif word == 'bad':
                self.bad(finding.id, now)
            else:
                continue
            return True
        return False

    def forget(self, job):
        """Learn job number `job` anew."""
        state, now = self.state, self.clock()
        with state.change():
            for number, in state.db.execute(
                    'SELECT id FROM finding WHERE job = ? AND ended IS NULL',
                    (job,)).fetchall():
                state.finding_end(number, now)
                end_alarm(state, state.finding(number), now,
                          'the job is learned anew')
            state.db.execute('DELETE FROM mail WHERE job = ?', (job,))
            state.db.execute(
                'UPDATE job SET runs = 0, due = NULL, miner = ?, memory = ?'
                ' WHERE id = ?', (packed(Miner().dumps()),
                                  packed(Memory().dump()), job))


##############################################################################
# Reports
#
# What it believes, and why: for people and as JSON.  Changes nothing.
##############################################################################


def date(at):
    return time.strftime('%Y-%m-%d %H:%M', time.localtime(at))


def jobs_known(state):
    """Each job as a dict for `list`, by name."""
    found = []
    for row in state.db.execute(
            'SELECT job.id, job.name, runs, seen, due, usual, (SELECT count(*)'
            ' FROM finding WHERE job = job.id AND ended IS NULL) AS open'
            ' FROM job ORDER BY name'):
        entry = dict(row)
        entry['learning'] = row['runs'] < LEARN_RUNS
        found.append(entry)
    return found


def list_text(state):
    """Lines of `list`: number, state, runs, last mail, name."""
    for job in jobs_known(state):
        said = ('%d open' % job['open'] if job['open'] else
                'learning' if job['learning'] else 'as usual')
        yield '%5d  %-9s %5d runs, last %s  %s' % (
            job['id'], said, job['runs'], date(job['seen']), job['name'])


def findings_since(state, at, condition='1'):
    """Findings since `at`, or still open, that meet an SQL condition."""
    return [Finding.of(row) for row in state.db.execute(
        'SELECT finding.*, job.name FROM finding JOIN job ON job.id ='
        ' finding.job WHERE (finding.at >= ? OR ended IS NULL) AND %s'
        ' ORDER BY finding.at' % condition, (at,))]


def finding_line(finding):
    """A finding in one line."""
    return '%5d  %s  %-8s %s: %s%s' % (
        finding.id, date(finding.at), finding.severity, finding.job,
        finding.reason, '' if finding.ended is None else
        '' if finding.severity == NOTICE else
        ' (over since %s)' % date(finding.ended))


def beliefs(state, row):
    """What is known of a job, as a dict that JSON can hold."""
    memory, _ = state.memory(row)
    known = {
        'id': row['id'], 'job': row['name'], 'key': row['key'],
        'runs': memory.n, 'remembered': len(memory.at),
        'learning': memory.n < LEARN_RUNS, 'seen': row['seen'],
        'due': row['due'], 'usual_interval': row['usual'],
        'status': sorted(memory.status), 'lines': [], 'numbers': [],
        'open': sorted(map(int, memory.open)), 'bad': memory.bad,
        'fine': memory.fine}
    for key, kind in memory.kinds.items():
        if not kind['n']:
            continue
        always = memory.always(key)
        runs = max(1, memory.n - max(memory.first, kind['n'][0]))
        known['lines'].append({
            'key': key, 'line': kind['s'], 'always': bool(always),
            'share': round(len(kind['n']) / runs, 3), 'runs': len(kind['n']),
            'count': [min(kind['c']), max(kind['c'])],
            'bad_words': kind['w']})
    known['lines'].sort(key=lambda one: -one['share'])
    for feature, (_, values) in memory.values.items():
        key = feature.partition('.')[0]
        if len(values) < 4:
            continue
        known['numbers'].append({
            'name': feature, 'usual': Judge.range(values),
            'last': values[-1], 'values': values[-60:],
            'line': memory.kinds[key]['s'] if key in memory.kinds else key})
    return known


def explain_text(state, row):
    """Lines of `explain`."""
    known = beliefs(state, row)
    yield '%s (job %d)' % (known['job'], known['id'])
    yield '  %d runs%s, the last one %s' % (
        known['runs'], ', learning' if known['learning'] else '',
        date(known['seen']))
    if known['due']:
        yield '  comes after %s; missed if not here by %s' % (
            period(known['usual_interval']), date(known['due']))
    elif not known['open']:
        yield '  comes when it likes: it is never missed'
    told = [name for name in known['status'] if name != 'None']
    if told:
        yield '  exit status: %s' % ', '.join(told)
    for number in known['open']:
        yield '  open: %s' % finding_line(state.finding(number))
    yield 'Lines, by the share of mails that have them:'
    for one in known['lines'][:100]:
        low, high = one['count']
        yield '  %-6s %-12s %s' % (
            'always' if one['always'] else '%d%%' % round(100 * one['share']),
            '' if high == 1 else '%s times' % (
                low if low == high else '%d-%d' % (low, high)),
            one['line'][:100])
    yield 'Numbers, by their usual range:'
    for one in known['numbers'][:200]:
        if '.' not in one['name']:
            yield '  %-24s %s' % (one['usual'], one['name'])
        elif len(set(one['values'])) > 1 or len(one['values']) >= 15:
            yield '  %-24s last %s in %s' % (
                one['usual'], amount(one['last']), one['line'][:80])


def digest_text(state, now, days=7):
    """Lines of the digest of the last days: what was raised, what was new
    and kept quiet, what is learning, what was silent.
    """
    since = now - days * DAY
    jobs = jobs_known(state)
    mails, quiet = 0, []
    for job in jobs:
        row = state.db.execute('SELECT * FROM job WHERE id = ?',
                               (job['id'],)).fetchone()
        memory, _ = state.memory(row)
        came = sum(1 for at in memory.at if at >= since)
        mails += came
        if came:
            quiet.append((came, job['name']))
    found = findings_since(state, since)
    loud = [one for one in found if one.severity != NOTICE]
    yield '%d mails of %d jobs in %d days; %d findings, %d of them open.' % (
        mails, len(quiet), days, len(loud),
        sum(1 for one in loud if one.ended is None))
    passed = passed_on(os.path.dirname(state.path))
    if passed:
        yield '%d mails could not be judged and are in passed/new.' % passed
    for title, chosen in (
            ('Open', [one for one in loud if one.ended is None]),
            ('Over', [one for one in loud if one.ended is not None]),
            ('New, and not worth an alarm',
             [one for one in found if one.severity == NOTICE])):
        if chosen:
            yield ''
            yield title + ':'
            for one in chosen[-40:]:
                yield finding_line(one)
    learning = [job['name'] for job in jobs if job['learning']]
    if learning:
        yield ''
        yield 'Learning: %s' % ', '.join(learning[:40])
    if quiet:
        yield ''
        yield 'Mails by job:'
        for came, name in sorted(quiet, reverse=True)[:100]:
            yield '%5d  %s' % (came, name)


def passed_on(folder):
    """Mails that were kept because they could not be judged."""
    try:
        return len(os.listdir(os.path.join(folder, 'passed', 'new')))
    except OSError:
        return 0


def chart(values, width=180, height=32):
    """A series as a small SVG: a line, its usual range shaded."""
    low, high = min(values), max(values)
    span = (high - low) or 1
    cut = len(values) // 20
    usual = sorted(values)[cut], sorted(values)[-1 - cut]

    def y(value):
        return 2 + (height - 4) * (1 - (value - low) / span)

    points = ' '.join('%.1f,%.1f' % (
        2 + (width - 4) * i / max(1, len(values) - 1), y(value))
        for i, value in enumerate(values))
    return ('<svg width="%d" height="%d" role="img"><rect x="0" y="%.1f" '
            'width="%d" height="%.1f" class="usual"/><polyline points="%s"/>'
            '</svg>' % (width, height, y(usual[1]) - 1, width,
                        y(usual[0]) - y(usual[1]) + 2, points))


STYLE = '''body{font:15px/1.4 sans-serif;margin:2em auto;max-width:64em;
padding:0 1em;color:#222;background:#fff}h2{font-size:1em;margin:2em 0 .3em}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;
text-align:left;vertical-align:middle}.warning,.critical{color:#a00}
.notice,.faint{color:#666}code{white-space:pre-wrap;overflow-wrap:anywhere}
polyline{fill:none;stroke:#06c;stroke-width:1.5}.usual{fill:#dbe9f7}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}
.usual{fill:#234}polyline{stroke:#6bf}.warning,.critical{color:#f77}
.notice,.faint{color:#999}}'''


def report_html(state, now):
    """Blocks of a page on all jobs that needs nothing but itself."""
    from html import escape
    yield ('<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
           '<meta name="viewport" content="width=device-width">'
           '<title>cronwatch</title><style>%s</style>\n<h1>cronwatch</h1>\n'
           '<p class="faint">%s</p>\n' % (STYLE, date(now)))
    found = findings_since(state, now - 14 * DAY)
    yield '<h2>Findings of two weeks, and open ones</h2>\n<table>\n'
    for one in reversed(found[-200:]):
        yield ('<tr class="%s"><td>%d<td>%s<td>%s<td>%s<td><code>%s</code>\n'
               % (one.severity, one.id, date(one.at), 'open'
                  if one.ended is None else one.severity, escape(one.job),
                  escape(one.reason)))
    yield '</table>\n'
    for job in jobs_known(state):
        row = state.db.execute('SELECT * FROM job WHERE id = ?',
                               (job['id'],)).fetchone()
        known = beliefs(state, row)
        yield '<h2>%s</h2>\n<p class="faint">%d runs%s, last %s%s</p>\n' % (
            escape(known['job']), known['runs'],
            ', learning' if known['learning'] else '', date(known['seen']),
            ', next by ' + date(known['due']) if known['due'] else '')
        yield '<table>\n'
        shown = [one for one in known['numbers']
                 if len(set(one['values'])) > 1]
        shown.sort(key=lambda one: '.' in one['name'])
        for one in shown[:12]:
            yield '<tr><td>%s<td>%s<td><code>%s</code>\n' % (
                chart(one['values']), escape(one['usual']),
                escape(one['line'][:120]))
        yield '</table>\n'
    yield '</html>\n'


##############################################################################
# Delivery
#
# A mail that is handed over is judged, or else passed on as it came: never
# lost, never bounced, whatever is wrong with us.  Only then is anybody told,
# and not for long.  Called by Commands only.
##############################################################################

DELIVERY_OPTIONS = {
    # Where mails go that could not be judged: an address, an mbox (a path),
    # a maildir (a path with / at its end).  If none is given, or it fails:
    # the maildir `passed` beside the state.
    'forward': (str, None),
    # Which of those that were judged go there, too: none, raised, all.
    'pass': (str, 'none'),
}

SECONDS = 240           # that a judgement may take before it is given up
TEMPFAIL = 75           # the mail program keeps the mail and tries again


def say(text):
    """To the system's log: a mail program would bounce what we print."""
    import syslog
    syslog.openlog('cronwatch', syslog.LOG_PID, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_ERR, text)


def pass_on(intake, target, folder):
    """Hand a mail on as it came; durable on return.  OSError if that can be
    done in no way.
    """
    for place in (target, os.path.join(folder, 'passed') + '/'):
        if not place:
            continue
        try:
            if place.endswith('/'):
                return to_maildir(intake, place)
            if place.startswith('/'):
                return to_mbox(intake, place)
            return to_address(intake, place)
        except (OSError, ValueError) as e:
            say('pass on to %s: %s' % (place, e))
    raise OSError('a mail could not be passed on')


def to_maildir(intake, path):
    import socket
    for name in ('tmp', 'new', 'cur'):
        os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
    name = '%.6f.%d.%s' % (time.time(), os.getpid(),
                           socket.gethostname().replace('/', '_'))
    with open(os.path.join(path, 'tmp', name), 'xb') as file:
        for block in intake.blocks():
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    os.rename(os.path.join(path, 'tmp', name),
              os.path.join(path, 'new', name))
    folder = os.open(os.path.join(path, 'new'), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def to_mbox(intake, path):
    """Append under a lock; what could not be written whole is cut off."""
    import fcntl
    with open(path, 'ab') as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        start = os.fstat(file.fileno()).st_size
        try:
            file.write(b'From cronwatch %s\n' % time.asctime(
                time.gmtime()).encode())
            rest = b''
            for block in intake.blocks():
                block, end, rest = (rest + block).rpartition(b'\n')
                file.write(re.sub(br'(?m)^(>*From )', br'>\1', block + end))
            file.write(re.sub(br'^(>*From )', br'>\1', rest)
                       + b'\n\n'[not rest:])
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, start)
            raise


def to_address(intake, address):
    import subprocess
    with subprocess.Popen(['/usr/sbin/sendmail', '-i', '--', address],
                          stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as child:
        for block in intake.blocks():
            child.stdin.write(block)
        child.stdin.close()
        if child.wait():
            raise OSError('sendmail: exit status %d' % child.returncode)


def marked(intake, verdict):
    """Blocks of the mail with a header that says what was found."""
    head = ('X-Cronwatch: %s\n' % verdict).encode('ascii', 'replace')
    blocks = intake.blocks()
    first = next(blocks)
    if first.startswith(b'From ') and b'\n' in first:
        line, first = first.split(b'\n', 1)
        head = line + b'\n' + head
    yield head + first
    yield from blocks


@contextlib.contextmanager
def bounded(seconds):
    """TimeoutError in the main thread after so many whole seconds."""
    import signal

    def late(*_):
        raise TimeoutError('it took more than %d seconds' % seconds)

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def deliver(folder, stream, out=None):
    """Take a mail from `stream`; (exit status, list of Findings).

    With `out`, a filter: the mail goes there, with a header that says what
    was found.
    """
    intake, watch, conf, findings, verdict = None, None, {}, [], None
    try:
        intake = Intake(stream)
        with bounded(SECONDS):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            conf = conf_read(os.path.join(folder, 'cronwatch.conf'), OPTIONS)
            watch = Watch(os.path.join(folder, 'state.db'), conf)
            findings = watch.deliver(intake.head, None, intake.size,
                                     intake.beyond)
        if findings is not None:
            verdict = 'raised %d, %s' % (
                findings[0].id, findings[0].kind) if findings else 'quiet'
    # Nothing whatever may lose the mail.
    except Exception as e:
        say('%s: %s' % (type(e).__name__, e))
        if intake is None:
            return TEMPFAIL, []
    status = hand_over(folder, conf, intake, findings, verdict, out)
    try:
        if watch is not None:
            # Hard, where each byte of an answer comes just in time.
            with bounded(HURRY_TOTAL):
                alarms_send(watch.state, conf, time.time(), hurry=True)
    except Exception as e:
        say('%s: %s' % (type(e).__name__, e))
    return status, findings or []


def hand_over(folder, conf, intake, findings, verdict, out):
    """Bring a mail where it goes after its verdict (None: there is none); the
    exit status.
    """
    try:
        if out is not None:
            for block in (intake.blocks() if verdict is None
                          else marked(intake, verdict)):
                out.write(block)
            out.flush()
        elif verdict is None or conf['pass'] == 'all' or (
                findings and (conf['pass'] == 'raised'
                              or not conf['person'])):
            pass_on(intake, conf.get('forward'), folder)
    except OSError as e:
        say('%s' % e)
        return TEMPFAIL
    return 0


##############################################################################
# Commands
#
# The command line.
#
# Exit statuses: 0 as usual; 1 something was raised or is open (check, show,
# deliver --status); 2 the command or the configuration is wrong; 75 a mail
# could not even be passed on, and whoever delivers it is to try again.  run
# has that of its command.
##############################################################################

OPTIONS = (ALARM_OPTIONS, DELIVERY_OPTIONS)


def show(args, entries, lines):
    """Print `lines`, or `entries` as JSON."""
    if args.json:
        import json
        print(json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        for line in lines:
            print(line)


def watch_open(args):
    os.makedirs(args.dir, mode=0o700, exist_ok=True)
    conf = conf_read(os.path.join(args.dir, 'cronwatch.conf'), OPTIONS)
    return Watch(os.path.join(args.dir, 'state.db'), conf)


def command_deliver(args):
    status, findings = deliver(
        args.dir, sys.stdin.buffer, sys.stdout.buffer if args.filter else None)
    if args.json and not args.filter:
        show(args, [one.as_json() for one in findings], ())
    return status or (1 if findings and args.status else 0)


def command_check(args):
    watch = watch_open(args)
    findings = watch.check()
    alarms_send(watch.state, watch.conf, time.time())
    show(args, [one.as_json() for one in findings],
         map(finding_line, findings))
    return 1 if findings else 0


def mails_of(path):
    """Yield (epoch, file, start, bytes) of the mails in a mail, an mbox or a
    maildir; None for the epoch of one that has no date.
    """
    if os.path.isdir(path):
        folders = [os.path.join(path, name) for name in ('cur', 'new')]
        if not any(map(os.path.isdir, folders)):
            folders = [path]
        for folder in filter(os.path.isdir, folders):
            for name in os.listdir(folder):
                yield from mails_of(os.path.join(folder, name))
        return
    with open(path, 'rb') as file:
        starts = [0]
        if file.read(5) == b'From ':
            starts, place, blank = [], 0, True
            file.seek(0)
            for line in file:
                if blank and line.startswith(b'From '):
                    starts.append(place)
                place += len(line)
                blank = line in (b'\n', b'\r\n')
        starts.append(file.seek(0, os.SEEK_END))
        for start, end in zip(starts, starts[1:]):
            file.seek(start)
            at = mail_date(mail_parse(file.read(min(end - start, 1 << 16))))
            yield at, path, start, end - start


def command_learn(args):
    watch = watch_open(args)
    mails, learned = [], 0
    for path in args.path:
        try:
            mails += mails_of(path)
        except OSError as e:
            raise Error('%s: %s' % (path, e.strerror)) from None
    dated = [mail for mail in mails if mail[0] is not None]
    undated = len(mails) - len(dated)
    for at, path, start, size in sorted(dated):
        with open(path, 'rb') as file:
            file.seek(start)
            learned += watch.learn(file.read(min(size, HEAD_BYTES)), at)
    show(args, {'learned': learned, 'mails': len(mails), 'undated': undated},
         ['%d mails learned, of %d%s' % (learned, len(mails), (
             '; without a date, and so left out: %d' % undated)
             if undated else '')])
    return 0


def command_ok(args):
    watch = watch_open(args)
    for number in args.finding:
        watch.ok(number)
    alarms_send(watch.state, watch.conf, time.time())
    return 0


def command_bad(args):
    watch = watch_open(args)
    for number in args.finding:
        watch.bad(number)
    return 0


def command_list(args):
    watch = watch_open(args)
    show(args, jobs_known(watch.state), list_text(watch.state))
    return 0


def command_show(args):
    watch = watch_open(args)
    if args.finding is None:
        found = findings_since(watch.state, time.time() - args.days * DAY,
                               'severity != "notice"')
        show(args, [one.as_json() for one in found],
             map(finding_line, found))
        return 1 if any(one.ended is None for one in found) else 0
    finding = watch.state.finding(args.finding)
    show(args, finding.as_json(), [finding_line(finding), '',
                                   finding_text(watch.state, finding)])
    return 0


def command_explain(args):
    watch = watch_open(args)
    rows = watch.state.jobs_named(args.job)
    if not rows:
        raise Error('no job is called %s' % args.job)
    for row in rows:
        show(args, beliefs(watch.state, row),
             explain_text(watch.state, row))
    return 0


def command_report(args):
    watch = watch_open(args)
    for block in report_html(watch.state, time.time()):
        sys.stdout.write(block)
    return 0


def command_digest(args):
    watch = watch_open(args)
    now = time.time()
    found = findings_since(watch.state, now - args.days * DAY)
    show(args, [one.as_json() for one in found],
         digest_text(watch.state, now, args.days))
    return 0


def command_forget(args):
    watch = watch_open(args)
    rows = watch.state.jobs_named(args.job)
    if len(rows) != 1:
        raise Error('%d jobs are called %s' % (len(rows), args.job))
    watch.forget(rows[0]['id'])
    return 0


class Child:
    """A command under watch: its output, as it comes, until it is over."""

    SIGNALS = ('SIGHUP', 'SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2')

    def __init__(self, words, echo):
        """Start it; OSError if that can not be done."""
        import signal
        import subprocess
        self.early = []         # signals that came before there was a child
        self.process = None
        self.echo = echo
        terminal = False
        try:
            terminal = os.tcgetpgrp(0) == os.getpgrp()
        except OSError:
            pass
        for name in self.SIGNALS:
            number = getattr(signal, name)
            # What is ignored (nohup) stays so, and what a terminal sends the
            # child gets from it.
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            if terminal and name in ('SIGINT', 'SIGQUIT'):
                signal.signal(number, lambda *_: None)
                continue
            signal.signal(number, self.signalled)
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            bufsize=0)
        for number in self.early:
            self.process.send_signal(number)

    def signalled(self, number, _):
        if self.process is None:
            self.early.append(number)
        else:
            self.process.send_signal(number)

    def read(self, _=None):
        """Some bytes of its output; none when it is over.  What it left
        running in the background with the output open is not waited for.
        """
        import select
        pipe = self.process.stdout.fileno()
        while True:
            ready, _, _ = select.select([pipe], [], [], 1)
            if ready:
                block = os.read(pipe, 1 << 16)
                if self.echo and block:
                    try:
                        sys.stdout.buffer.write(block)
                        sys.stdout.buffer.flush()
                    except BrokenPipeError:     # nobody reads any more
                        self.echo = False
                return block
            if self.process.poll() is not None:
                return b''


def run_name(words):
    """(key, name) of the job that a command line is."""
    import getpass
    import shlex
    import socket
    name = words if isinstance(words, str) else ' '.join(
        map(shlex.quote, words))
    who = '%s@%s' % (getpass.getuser(), socket.gethostname())
    return ('run %s %s' % (who, varying_masked(name)),
            '%s: %s' % (who, name))


def command_run(args):
    """Run a command and judge what it said; its exit status."""
    clock = time.monotonic()
    child, problem = None, b''
    try:
        child = Child(args.command_line, args.verbose)
        intake = Intake(child)
        status = child.process.wait()
    except OSError as e:
        if child is not None:       # no room for the output
            child.process.stdout.close()
            return died(child.process.wait())
        import io
        problem = ('%s: %s\n' % (args.command_line[0],
                                 e.strerror)).encode()
        intake = Intake(io.BytesIO(problem))
        status = 127 if isinstance(e, FileNotFoundError) else 126
    findings, fault = [], None
    try:
        watch = watch_open(args)
        key, name = run_name(args.name or args.command_line)
        lines, count = text_lines(intake.head.decode('utf-8', 'replace'),
                                  intake.beyond)
        findings = watch.take(Run(
            key[:500], name[:200], time.time(), lines, count, intake.size,
            status, time.monotonic() - clock))
        alarms_send(watch.state, watch.conf, time.time(), hurry=True)
        for finding in findings:
            print('cronwatch: %s\n\n%s' % (finding.reason, finding_text(
                watch.state, finding)))
        sys.stdout.flush()
    except BrokenPipeError:             # nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Whatever is wrong with us, the command's output and status are not lost.
    except Exception as e:
        fault = e
    if fault is not None:
        if not args.verbose:
            for block in intake.blocks():
                sys.stdout.buffer.write(block)
        sys.stdout.flush()
        print('cronwatch: %s: %s' % (type(fault).__name__, fault),
              file=sys.stderr)
    return died(status)


def died(status):
    """The exit status of a command; dies of the signal that it died of."""
    if status >= 0:
        return status
    import resource
    import signal
    sys.stdout.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    return 128 - status


# Alarms.

# What exit statuses of monitors mean; any other is critical.
PROBE_WORDS = {0: None, 1: WARNING, 3: WARNING}


def alarm_parsers(commands):
    """Add the commands of alarms to the command line."""
    import argparse

    def add(name, run, help):
        parser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(function=run)
        return parser

    sub = add('raise', command_raise, 'raise an alarm')
    sub.add_argument('--severity', choices=list(RANKS), default=CRITICAL)
    sub.add_argument('--cause', help='a name; one alarm for each at a time')
    sub.add_argument('text', nargs='+', help='what is wrong, or - to read it')
    sub = add('over', command_over, 'an alarm is over')
    sub.add_argument('alarm', help='its number, or the name of its cause')
    sub.add_argument('why', nargs='*', help='what to tell those who know')
    sub = add('alarms', command_alarms, 'list the alarms that are not over')
    sub.add_argument('--all', action='store_true', help='all of them')
    sub.add_argument('--json', action='store_true',
                     default=argparse.SUPPRESS)
    sub = add('ack', command_ack, 'take care of alarms: nobody else is told')
    sub.add_argument('alarm', nargs='+', help='its number, or all')
    sub = add('escalate', command_escalate, 'tell who is to be told by now')
    sub.add_argument('--loop', action='store_true', help='do so for ever')
    sub = add('probe', command_probe, 'run a check of a monitor: status 0 '
              'is well, 1 or 3 a warning, any other critical')
    sub.add_argument('--cause', help='its name, by default the command')
    sub.add_argument('--times', type=int, default=1,
                     help='how often it must fail in a row')
    sub.add_argument('--timeout', type=int, default=300, help='seconds')
    sub.add_argument('words', nargs='+', metavar='command')
    add('callback', command_callback, 'answer a CGI request')


def alarm_say(line):
    print('cronwatch: %s' % line, file=sys.stderr)


def command_raise(args):
    """Raise an alarm of a script; prints its number."""
    watch = watch_open(args)
    state, conf = watch.state, watch.conf
    text = ' '.join(args.text)
    if text == '-':
        text = sys.stdin.buffer.read(10 ** 6).decode('utf-8', 'replace')
    if not text.strip():
        raise Error('an alarm needs a text')
    with state.change():
        number = alarm_raise(state, args.severity, args.cause, text,
                             time.time())
    print(number)
    if not conf['person']:
        alarm_say('nobody is told: the configuration names no person')
    alarms_send(state, conf, time.time(), alarm_say)


def alarm_number(state, name):
    """The number of an alarm that is not over, by number or cause."""
    found = state.db.execute(
        "SELECT id FROM alarm WHERE state != 'over' AND (cause = ? OR id = ?)",
        (name, int(name) if re.fullmatch('[0-9]{1,12}', name) else -1)
    ).fetchone()
    if found is None:
        raise Error('no alarm %s' % name)
    return found[0]


def command_over(args):
    """An alarm is over; who was told of it hears so."""
    watch = watch_open(args)
    why = alarm_line(' '.join(args.why)) or 'somebody said so'
    with watch.state.change():
        alarm_over(watch.state, alarm_number(watch.state, args.alarm),
                   time.time(), why)
    alarms_send(watch.state, watch.conf, time.time(), alarm_say)


def command_ack(args):
    """Take care of alarms."""
    import getpass
    watch = watch_open(args)
    if args.alarm == ['all']:
        numbers = [row[0] for row in watch.state.db.execute(
            "SELECT id FROM alarm WHERE state = 'open'")]
    else:
        numbers = [alarm_number(watch.state, name) for name in args.alarm]
    alarm_ack(watch.state, numbers, getpass.getuser(), 'command', time.time())


def command_escalate(args):
    """Tell whoever is to be told by now."""
    watch = watch_open(args)
    while True:
        alarms_send(watch.state, watch.conf, time.time(), alarm_say)
        if not args.loop:
            return
        time.sleep(5)


def command_alarms(args):
    """Print the alarms that are not over, or all of them."""
    watch = watch_open(args)
    state = watch.state
    found = [alarm_story(state, alarm) for alarm in state.db.execute(
        'SELECT * FROM alarm %s ORDER BY id' % (
            '' if args.all else "WHERE state != 'over'")).fetchall()]
    show(args, found, [*alarms_text(found), *(
        '%s said STOP: no SMS goes there' % row['number']
        for row in state.db.execute('SELECT * FROM stopped'))])


def alarms_text(stories):
    """Yield lines that tell alarm_story()s."""
    for alarm in stories:
        times = ', %d times' % alarm['times'] if alarm['times'] > 1 else ''
        end = {'open': '', 'acked': ', %s takes care of it (%s)' % (
            alarm['who'], alarm['why']), 'over': ', over: %s' % alarm['why']}
        yield ('%d %s since %s%s%s\n    %s' % (
            alarm['id'], alarm['severity'], alarm_time(alarm['at']), times,
            end[alarm['state']], alarm['title']))
        told = [one for one in alarm['told'] if one['state'] != 'planned']
        for one in told + alarm['told'][len(told):][:1]:
            yield ('    %s %s to %s%s' % (
                alarm_time(one['at']), one['way'], one['person'],
                '' if one['state'] == 'sent' else ': %s' % ' '.join(
                    filter(None, (one['state'], one['said'])))))


def alarm_story(state, alarm):
    """An alarm and who was and will be told of it, for JSON."""
    story = {name: alarm[name] for name in (
        'id', 'finding', 'cause', 'severity', 'title', 'body', 'at', 'times',
        'state', 'ended', 'who', 'why')}
    story['told'] = [dict(row) for row in state.db.execute(
        "SELECT notice.kind, notice.person, notice.way,"
        " coalesce(tried, next) AS at, state, said FROM step JOIN notice"
        " ON notice.id = step.notice WHERE alarm = ? UNION ALL"
        " SELECT kind, person, way, ? + after, 'planned', NULL FROM step"
        " WHERE alarm = ? AND notice IS NULL AND ? = 'open' ORDER BY at",
        (alarm['id'], alarm['base'], alarm['id'], alarm['state']))]
    return story


def alarm_time(seconds):
    return time.strftime('%a %H:%M', time.localtime(seconds))


def command_probe(args):
    """Run a monitor's check, and raise or end its alarm; its exit status."""
    import subprocess
    watch = watch_open(args)
    state, conf = watch.state, watch.conf
    cause = args.cause or ' '.join(args.words)
    try:
        done = subprocess.run(args.words, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, check=False,
                              stderr=subprocess.STDOUT, timeout=args.timeout)
        status, said = done.returncode, done.stdout[:10 ** 5]
    except subprocess.TimeoutExpired:
        status, said = 2, b'no answer in %d seconds' % args.timeout
    except OSError as e:
        status, said = 3, ('%s: %s' % (args.words[0], e.strerror)).encode()
    said = '%s: %s' % (cause, probe_text(said.decode('utf-8', 'replace'))
                       or 'exit status %d' % status)
    now = time.time()
    with state.change():
        probe_took(state, cause, PROBE_WORDS.get(status, CRITICAL), said,
                   args.times, now)
    alarms_send(state, conf, now, alarm_say)
    return status if 0 <= status < 256 else 2


def probe_text(said):
    """What a plugin of Nagios said, without what is for Nagios."""
    return '\n'.join(re.sub(
        r'^(\S+ )?(OK|WARNING|CRITICAL|UNKNOWN)\b[\s:-]*', '',
        line.partition('|')[0].strip()) for line in said.strip().splitlines())


def probe_took(state, cause, severity, said, times, now):
    """Judge one result of a probe: well if `severity` is None."""
    if severity is None:
        state.db.execute('DELETE FROM probe WHERE cause = ?', (cause,))
        found = state.db.execute("SELECT id FROM alarm WHERE cause = ? AND"
                                 " state != 'over'", (cause,)).fetchone()
        if found:
            alarm_over(state, found[0], now, alarm_line(said)[:200])
        return
    state.db.execute('INSERT OR IGNORE INTO probe VALUES (?, 0)', (cause,))
    state.db.execute('UPDATE probe SET bad = bad + 1 WHERE cause = ?',
                     (cause,))
    bad, = state.db.execute('SELECT bad FROM probe WHERE cause = ?',
                            (cause,)).fetchone()
    if bad >= times:
        alarm_raise(state, severity, cause, said, now)


def command_callback(args):
    """One CGI request, from the environment and standard input."""
    watch, status = watch_open(args), '200 OK'
    try:
        head, body = alarm_answer(watch.state, watch.conf, os.environ,
                                  sys.stdin.buffer, time.time())
    except (Forbidden, Error) as e:
        status, head, body = ('403 Forbidden', 'Content-Type: text/plain\n',
                              'Forbidden\n')
        if isinstance(e, Error):
            print('cronwatch: %s' % e, file=sys.stderr)
    sys.stdout.buffer.write((
        'Status: %s\n%sCache-Control: no-store\n'
        'X-Content-Type-Options: nosniff\n\n%s' % (status, head, body)
    ).encode())


def parser_make():
    import argparse
    parser = argparse.ArgumentParser(
        prog='cronwatch', description='Reads the mails of cron and raises '
        'what is not as usual.')
    parser.add_argument('--version', action='version',
                        version='cronwatch ' + VERSION)
    parser.add_argument('--dir', default=os.environ.get(
        'CRONWATCH_DIR') or os.path.expanduser('~/.cronwatch'),
        help='where state.db and cronwatch.conf are (~/.cronwatch)')
    parser.add_argument('--json', action='store_true',
                        help='print JSON for programs')
    commands = parser.add_subparsers(dest='command', metavar='command',
                                     required=True)

    def add(name, function, text):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    command = add('deliver', command_deliver,
                  'judge and learn the mail on standard input')
    command.add_argument('--filter', action='store_true', help='write the '
                         'mail to standard output, with a header X-Cronwatch')
    command.add_argument('--status', action='store_true',
                         help='exit with 1 if something was raised')
    command = add('learn', command_learn, 'learn from old mails')
    command.add_argument('path', nargs='+', help='maildir, mbox or mail')
    command = add('run', command_run, 'run a command and judge its output')
    command.add_argument('--name', help='of the job, if not the command')
    command.add_argument('-v', '--verbose', action='store_true',
                         help='print the output as well')
    command.add_argument('command_line', nargs=argparse.REMAINDER,
                         metavar='command ...')
    add('check', command_check, 'raise mails that did not come')
    for name, function, text in (
            ('ok', command_ok, 'what was found is normal from now on'),
            ('bad', command_bad, 'what was found is never normal')):
        add(name, function, text).add_argument('finding', type=int, nargs='+')
    add('list', command_list, 'the jobs')
    command = add('show', command_show, 'findings, or one with its mail')
    command.add_argument('finding', type=int, nargs='?')
    command.add_argument('--days', type=int, default=7)
    command = add('explain', command_explain, 'what is believed of a job')
    command.add_argument('job', help='its number, or a part of its name')
    add('report', command_report, 'a page in HTML on all jobs')
    command = add('digest', command_digest, 'what happened, for a mail a week')
    command.add_argument('--days', type=int, default=7)
    command = add('forget', command_forget, 'learn a job anew')
    command.add_argument('job', help='its number, or a part of its name')
    alarm_parsers(commands)
    return parser


def deliver_args(argv):
    """The arguments of a plain `[--dir DIR] deliver`, else None.

    To make the parser of all commands takes 10 ms, longer than to judge.
    """
    from types import SimpleNamespace
    folder = os.environ.get('CRONWATCH_DIR') or os.path.expanduser(
        '~/.cronwatch')
    if len(argv) == 3 and argv[0] == '--dir':
        folder, argv = argv[1], argv[2:]
    if argv != ['deliver']:
        return None
    return SimpleNamespace(dir=folder, json=False, filter=False, status=False,
                           command='deliver', function=command_deliver)


def main(argv=None):
    """Run one command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = deliver_args(argv) or parser_make().parse_args(argv)
    if args.command == 'run':
        if args.command_line[:1] == ['--']:
            del args.command_line[0]
        if not args.command_line:
            print('cronwatch: run what?', file=sys.stderr)
            return 2
    import sqlite3
    try:
        return args.function(args) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130
    except (Error, OSError, sqlite3.Error) as e:
        print('cronwatch: %s' % e, file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
