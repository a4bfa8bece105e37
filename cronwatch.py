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
    Alarms          who is told, how, and until when
    Watch           a mail from arrival to alarm; feedback
    Reports         what it believes, and why
    Delivery        whatever happens, the mail is not lost
    Commands        the command line
"""

import os
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
PARTS = 100             # of a multipart mail


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
    import re
    if '\x1b' in text:
        text = re.sub(r'\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*\x07?|.)',
                      '', text)
    # A lone surrogate cannot be kept in SQLite.
    text = text.encode('utf-8', 'replace').decode('utf-8')
    found = text.replace('\r\n', '\n').split('\n')
    while found and not found[-1].strip():
        found.pop()
    count = len(found) + beyond
    numbered = enumerate(found, 1)
    if len(found) > LINES_FIRST + LINES_LAST:
        numbered = list(numbered)
        numbered[LINES_FIRST:-LINES_LAST] = []
    lines = []
    for number, line in numbered:
        line = line.rstrip()
        if '\r' in line:
            line = line[line.rindex('\r') + 1:]
        if line.strip():
            lines.append((number, line[:LINE_CHARS].replace('\0', ' ')))
    return lines, count


def html_text(text):
    """What a reader sees of HTML, roughly: a line for each block."""
    import html
    import re
    text = re.sub(r'(?is)<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?-->',
                  ' ', text)
    text = re.sub(r'\s+', ' ', text)
    text = re.sub(r'(?i)</t[dh]\s*>', ' ', text)
    text = re.sub(r'(?i)<(br|hr|/?p|/?div|/?tr|/?li|/?h\d|/?table|/?pre)\b'
                  r'[^>]*>', '\n', text)
    text = html.unescape(re.sub(r'<[^>]*>', '', text))
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
    return ' '.join(text.replace('\0', ' ').split())


def decoded(data, charset):
    """Bytes as text: by their charset if it is one, and never an error."""
    charset = (charset or 'us-ascii').lower()
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
    import re
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
    import re
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
    from email.parser import BytesParser
    return BytesParser().parsebytes(raw)


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
# What varies within a line.  Knows nothing of jobs.
##############################################################################

##############################################################################
# Miner
#
# Lines to kinds of lines, one miner for each job.  A kind has a key that
# stays its own for good, whatever is learned later: the Judge's memory hangs
# on it.  Must be cheap to load and small: it is loaded for each mail.
##############################################################################


class Miner:
    """The kinds of lines of one job.

    add(line) -> (key, values): the kind of the line, learned if it is new.
    `key` is a short str.  `values` has what stood in the variable parts, by
    slot: {slot: float} for numbers (sizes in bytes, durations in seconds,
    percents as they stand), {slot: str} for texts (path, host, id, ...).
    A slot is a short str that stays the same for the kind, whatever is
    learned later.
    find(line) -> the same, or None where add would make a new kind.
    template(key) -> the kind as people read it, variable parts as <*>.
    dumps() -> str, and Miner(state) of that str is as it was.
    """

    def __init__(self, state=None):
        import json
        self.kinds = json.loads(state) if state else {}

    def _split(self, line):
        import re
        parts = re.split(r'(-?\d+(?:\.\d+)?)', line)
        values = {str(i // 2): float(part)
                  for i, part in enumerate(parts) if i % 2}
        return '<*>'.join(parts[::2]), values

    def add(self, line):
        template, values = self._split(line)
        return self.kinds.setdefault(template, '%x' % len(self.kinds)), values

    def find(self, line):
        template, values = self._split(line)
        key = self.kinds.get(template)
        return None if key is None else (key, values)

    def template(self, key):
        for template, own in self.kinds.items():
            if own == key:
                return template
        raise KeyError(key)

    def dumps(self):
        import json
        return json.dumps(self.kinds)


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
        return self.db.execute(
            'INSERT INTO job(name, runs, seen, due, usual, miner, memory,'
            ' key) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
            values + (run.key,)).lastrowid

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
        """Drop findings of long ago."""
        self.db.execute('DELETE FROM finding WHERE at < ? AND ended IS NOT'
                        ' NULL AND id NOT IN (SELECT finding FROM alarm)',
                        (now - 400 * DAY,))


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
    if lines:
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
        import re
        self.strong = re.compile(r'(?<![\w-])(?:%s)(?![\w-])' % STRONG, re.I)
        self.mild = re.compile(r'(?<![\w-])(?:%s)(?![\w-])' % MILD, re.I)
        self.grave = re.compile(r'(?<!\w)(?:%s)' % GRAVE, re.I)
        # Names of files say nothing, nor do errors of which there are none.
        self.names = re.compile(r'\S*/\S*|\S+\.(?:log|txt|conf|py|sh|gz)\b')
        none = r'(?:0|no|none|without|zero|nil)'
        self.none = re.compile(
            r'(?<![\w.])%s (?:\w+ )?(?:%s|%s)(?![\w-])'
            r'|(?<!\w)(?:%s|%s)(?:\(s\))?(?: \w+)? ?[:=] ?(?:0|none|no)'
            r'(?![\w.])' % (none, STRONG, MILD, STRONG, MILD), re.I)

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
        self.texts = {}         # key.slot -> {text: (number, line)}
        self.words = {}         # key -> {word: (number, line)}, weight > 0
        self.weights = {}       # key -> the greatest weight of a line
        several = {}            # key -> [(values, line), ...]
        for line in run.lines:
            key, values = miner.add(line[1])
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
            'odd': [],      # runs that were not learned, or at a wrong time
            'new': [],      # runs with a new kind of line
            'newbad': [],   # runs with one that had a bad word
            'status': {},   # exit status -> last run
            'kinds': {},    # key -> see kind()
            'texts': {},    # key.slot -> {text: last run}, None: anything
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

    def always(self, key, within=60):
        """In how many of the last runs it was, if in all of them; else 0."""
        kind = self.kinds[key]
        if not kind['n']:
            return 0
        start = max(kind['n'][0], self.n - within, self.first)
        blind = sum(1 for n in set(kind['b']) | set(self.odd) if n >= start)
        hits = sum(1 for n in kind['n'] if n >= start)
        return hits if hits >= self.n - start - blind else 0

    def trim(self):
        """Forget what is old."""
        numbers = sum(len(column[0]) for column in self.values.values()) \
            + sum(len(kind['n']) for kind in self.kinds.values())
        keep = min(RUNS, max(30, int(
            NUMBERS * len(self.at) / max(numbers, 1))))
        if len(self.at) > keep:
            del self.at[:-keep]
        first, now = self.first, self.at[-1]
        for name in ('odd', 'new', 'newbad'):
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
    known = [scaled(one, scale) for one in values]
    low, high = min(known), max(known)
    middle = median(known)
    if scale == 'count':
        least = 3.5 if high > low else 2.5
    elif scale == 'log':
        least = 0.35
    else:
        least = max(abs(middle) * 0.03, 1.5)
    margin = doubt * max((high - low) * 0.5 * (1 + 8 / len(known)), least)
    place = scaled(value, scale)
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
        # A job that was often wrongly said to be unusual is believed less.
        recent = sum(1 for cause, times in memory.told.items()
                     if cause not in memory.bad
                     for at in times if at > self.run.at - 60 * DAY)
        self.doubt = 1 + 0.25 * min(recent, 6)

    def judge(self):
        """The list of Evidence, the heaviest first."""
        self.status()
        if self.memory.n >= 3:
            self.length()
        if not self.whole:
            self.new_lines()
            self.missing_lines()
            self.counts()
            self.numbers()
            self.order()
        self.time()
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
            self.say('long', 'length', WARNING, 60, '%d lines, usually %s'
                     % (count, self.range(values)),
                     self.worst_lines())
        elif len(values) >= 12 and least >= 10 and count < least / 5:
            self.say('short', 'length', WARNING, 30, '%d lines, usually %s'
                     % (count, self.range(values)))

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

    def novelty(self, runs):
        """Share of runs with a new kind of line, and how many it is of."""
        considered = min(60, max(0, self.memory.n - 5))
        found = sum(1 for n in set(runs)
                    if n >= max(5, self.memory.n - considered))
        return (found + 0.5) / (considered + 1), considered

    def new_lines(self):
        memory, observed = self.memory, self.observed
        rate, runs = self.novelty(memory.new)
        badrate, _ = self.novelty(memory.newbad)
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
            if weight >= 2 and (badrate < 0.2 or weight > 2):
                severity = CRITICAL if weight > 2 else WARNING
            elif weight == 1 and runs >= 5 and rate < 0.15:
                severity = WARNING
            elif runs >= 10 and rate * self.doubt < 0.05:
                severity = WARNING
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

    def missing_lines(self):
        memory, observed = self.memory, self.observed
        gone = []
        for key, kind in memory.kinds.items():
            if key in observed.kinds or 'missing ' + key in memory.fine:
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
        blind = set(kind['b']) | set(memory.odd)
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
            values += [0] * max(0, runs - len(values) - len(kind['b']))
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
        if low >= 0 and high < 20 and all(one == int(one) for one in values):
            scale = 'count'
        far = out_of_range(values, value, scale, self.doubt)
        if abs(far) > 1:
            steps = self.steps(values, value)
            if steps is not None and abs(steps) <= 1:
                return None
            return WARNING, 45 + min(abs(far), 5), where
        steps = self.steps(values, value)
        if steps is not None and abs(steps) > 1:
            return WARNING, 42, '%s after %s, a step as never before: %s' % (
                amount(value), amount(values[-1]), quoted(line[1]))
        return self.full(runs, values, value, line) \
            or self.stuck(values, value, line)

    def constant(self, values, value, weight, where):
        if len(values) < 15:
            return None
        if values[0] == 0:
            if self.words.found(where)[0] or len(values) >= 60:
                return WARNING, 44, where
            return NOTICE, 20, where
        if abs(values[0]) < 1000 and values[0] == int(values[0]):
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
        return out_of_range(steps, value - values[-1], 'linear', self.doubt)

    def full(self, runs, values, value, line):
        """A share that grows and will be 100 % within two weeks."""
        if not 80 <= value <= 100 or '%' not in line[1] \
                or value <= max(values) or len(values) < 10:
            return None
        memory = self.memory
        past = [(memory.at[n - memory.first], one)
                for n, one in zip(runs, values) if n >= memory.first][-30:]
        if not past or self.run.at <= past[0][0]:
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
        if len(past) < 20 or past[-1] != value or past[-2] != value:
            return None
        before = past[:-2]
        if any(a == b for a, b in zip(before, before[1:])):
            return None
        return WARNING, 41, '%s for the third time; it was another number ' \
            'each time before: %s' % (amount(value), quoted(line[1]))

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
        least = min(gaps[-60:])
        if least > 600 and now - times[-1] < 0.3 * least:
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
    odd = set(memory.odd)
    times = [at for n, at in enumerate(memory.at, memory.first)
             if n not in odd]
    if len(times) < 4 or not memory.at:
        return None
    last = memory.at[-1]
    pairs = [(a, b - a) for a, b in zip(times, times[1:])]
    usual = median([gap for _, gap in pairs[-60:]])
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
    same = sorted(same[-60:])
    most = same[-1 - len(same) // 20]
    grace = max(600, 0.1 * most)
    if most > 3 * median(same):         # it comes when it likes
        if len(pairs) < 15:
            return None
        grace = 1.5 * same[-1]
    return last + max(most + grace, memory.patience * median(same)), \
        median(same)


def run_learn(memory, observed, evidence):
    """Take a run into memory, but for what was not as usual."""
    run, n = observed.run, memory.n
    causes = {one.cause for one in evidence if one.severity != NOTICE}
    memory.at.append(run.at)
    memory.n += 1
    if not causes & {'status %s' % run.status}:
        memory.status[str(run.status)] = n
    if causes & {'empty', 'long'}:
        memory.odd.append(n)
        memory.trim()
        return
    if 'time' in causes:
        memory.odd.append(n)
    if any(cause.startswith('order ') for cause in causes):
        ordered = False
    else:
        ordered = True
    for one in evidence:
        if one.cause.startswith(('new ', 'word ')):
            worded = one.weight > 70
            (memory.newbad if worded else memory.new).append(n)
    for key, (count, place, line) in observed.kinds.items():
        if 'new ' + key in causes:
            continue
        kind = memory.kind(key)
        kind['t'], kind['s'] = run.at, line[1][:160]
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
    for feature, (value, _) in observed.values.items():
        if 'value ' + feature in causes:
            continue
        column = memory.values.setdefault(feature, [[], []])
        column[0].append(n)
        column[1].append(value)
    for slot, texts in observed.texts.items():
        known = memory.texts.setdefault(slot, {})
        if known is not None:
            known.update(dict.fromkeys(texts, n))
            if len(known) > TEXTS:
                memory.texts[slot] = None
    memory.trim()


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
    elif word == 'missing':
        kind = memory.kind(rest)
        kind['b'] = [n for n in kind['b'] if n not in runs]
    elif word == 'count':
        kind = memory.kind(rest)
        kind['b'] = [n for n in kind['b'] if n not in runs]
        merge(held, kind['n'], kind['c'], kind['p'])
    elif word == 'value':
        merge(held, *memory.values.setdefault(rest, [[], []]))
    elif word == 'status':
        memory.status[rest] = memory.n
    elif word == 'time':
        memory.odd = [n for n in memory.odd if n not in runs]
    else:                       # order, empty, long, short
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
# Alarms
#
# Who is told of a finding, how, and until when.  An alarm is kept in the
# state file before anything is sent.  Knows nothing of mails that came and of
# why something was found.
##############################################################################

ALARM_SCHEMA = '''
CREATE TABLE IF NOT EXISTS alarm(
    id INTEGER PRIMARY KEY,
    finding INTEGER NOT NULL UNIQUE REFERENCES finding,
    at REAL NOT NULL,
    acknowledged REAL);
'''

# Options of the configuration file that are ours.
ALARM_OPTIONS = {
}


def raise_alarm(state, finding, now):
    """Keep the alarm of a Finding; sends nothing.

    Runs within the transaction of the finding.  alarms_send sends.
    """
    state.db.execute('INSERT OR IGNORE INTO alarm(finding, at) VALUES (?, ?)',
                     (finding.id, now))


def end_alarm(state, finding, now, why):
    """The cause of `finding` is gone (`why` in words for people, as `it came
    after all`), or somebody said that it is normal: stop calling, and tell
    those who were told.  Runs within a transaction; sends nothing.
    """
    state.db.execute('UPDATE alarm SET acknowledged = ? WHERE finding = ?'
                     ' AND acknowledged IS NULL', (now, finding.id))


def alarms_send(state, conf, now):
    """Send what is due.  Called after each delivery and check, outside of any
    transaction; never raises for what a network or a mail program does.
    """


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
        """
        now = self.clock() if now is None else now
        size = len(raw) if size is None else size
        if len(raw) > HEAD_BYTES:
            beyond += raw.count(b'\n', HEAD_BYTES)
            raw = raw[:HEAD_BYTES]
        message = mail_parse(raw)
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
            harmless = cause.startswith('new ') and not entry['strong']
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
            'since': memory.n, 'at': now, 'strong': True,
            'held': {'absent': [[memory.n, None]]}}
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
        import re
        for number, token in re.findall(r'\b(\d+)-([0-9a-f]{16})\b', ' '.join(
                re.findall(r'<cronwatch\.[^<>\s]*>', named))):
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
# lost, never bounced, whatever is wrong with us.  Called by Commands only.
##############################################################################

DELIVERY_OPTIONS = {
    # Where mails go that could not be judged: an address, an mbox (a path),
    # a maildir (a path with / at its end).  If none is given, or it fails:
    # the maildir `passed` beside the state.
    'forward': (str, None),
    # Which of those that were judged go there, too: none, raised, all.
    'pass': (str, 'none'),
}

SECONDS = 240           # that a delivery may take before it is given up
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
    import re
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


def deliver(folder, stream, out=None):
    """Take a mail from `stream`; (exit status, list of Findings).

    With `out`, a filter: the mail goes there, with a header that says what
    was found.
    """
    import signal

    def late(*_):
        raise TimeoutError('it took more than %d seconds' % SECONDS)

    intake, conf, findings, verdict = None, {}, [], None
    try:
        intake = Intake(stream)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        conf = conf_read(os.path.join(folder, 'cronwatch.conf'), OPTIONS)
        watch = Watch(os.path.join(folder, 'state.db'), conf)
        findings = watch.deliver(intake.head, None, intake.size,
                                 intake.beyond)
        verdict = 'raised %d, %s' % (
            findings[0].id, findings[0].kind) if findings else 'quiet'
        alarms_send(watch.state, conf, time.time())
    # Nothing whatever may lose the mail.
    except Exception as e:
        say('%s: %s' % (type(e).__name__, e))
        if intake is None:
            return TEMPFAIL, []
    signal.alarm(0)
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
        return TEMPFAIL, findings
    return 0, findings


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
    """Yield (epoch, file, start, bytes) of the mails with a date in a mail,
    an mbox or a maildir.
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
            if at is not None:
                yield at, path, start, end - start


def command_learn(args):
    watch = watch_open(args)
    dated, learned = [], 0
    for path in args.path:
        try:
            dated += mails_of(path)
        except OSError as e:
            raise Error('%s: %s' % (path, e.strerror)) from None
    for at, path, start, size in sorted(dated):
        with open(path, 'rb') as file:
            file.seek(start)
            learned += watch.learn(file.read(min(size, HEAD_BYTES)), at)
    show(args, {'learned': learned, 'mails': len(dated)},
         ['%d mails learned, of %d' % (learned, len(dated))])
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
                    sys.stdout.buffer.write(block)
                    sys.stdout.buffer.flush()
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
    started, clock = time.time(), time.monotonic()
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
        alarms_send(watch.state, watch.conf, time.time())
        for finding in findings:
            print('cronwatch: %s\n\n%s' % (finding.reason, finding_text(
                watch.state, finding)))
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
    sys.stdout.flush()
    del started
    return died(status)


def died(status):
    """The exit status of a command; dies of the signal that it died of."""
    if status >= 0:
        return status
    import resource
    import signal
    sys.stdout.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(-status, signal.SIG_DFL) if -status not in (
        signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
    return 128 - status


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
    return parser


def main(argv=None):
    """Run one command; the exit status."""
    args = parser_make().parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == 'run':
        if args.command_line[:1] == ['--']:
            del args.command_line[0]
        if not args.command_line:
            print('cronwatch: run what?', file=sys.stderr)
            return 2
    import sqlite3
    try:
        return args.function(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Error, OSError, sqlite3.Error) as e:
        print('cronwatch: %s' % e, file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
