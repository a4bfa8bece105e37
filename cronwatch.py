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


class Run:
    """One run of a job: what a mail says, or a command that was wrapped."""

    __slots__ = ('key', 'name', 'at', 'lines', 'size', 'status', 'seconds',
                 'raw')

    def __init__(self, key, name, at, lines, size, status=None, seconds=None,
                 raw=b''):
        self.key = key          # of the job, the same for all its runs
        self.name = name        # of the job, as people know it
        self.at = at            # epoch, when it came
        self.lines = lines      # the text, decoded
        self.size = size        # bytes of the mail, all of them
        self.status = status    # exit status, or None if not known
        self.seconds = seconds  # how long it took, or None
        self.raw = raw          # the mail, or its beginning


def mail_read(raw, now):
    """The Run that the mail `raw` tells of."""
    head, _, body = raw.partition(b'\n\n')
    subject = ''
    for line in head.decode('utf-8', 'replace').splitlines():
        if line.lower().startswith('subject:'):
            subject = line[8:].strip()
    lines = body.decode('utf-8', 'replace').splitlines()
    return Run(subject, subject, now, lines, len(raw), raw=raw)


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

STATE_SCHEMA = '''
CREATE TABLE IF NOT EXISTS job(
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    seen REAL NOT NULL,             -- when its last mail came
    due REAL,                       -- when check misses the next, if ever
    memory BLOB NOT NULL);          -- what was learned
CREATE INDEX IF NOT EXISTS job_due ON job(due);
CREATE TABLE IF NOT EXISTS finding(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER NOT NULL REFERENCES job,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    severity TEXT NOT NULL,
    reason TEXT NOT NULL,
    lines TEXT NOT NULL,            -- JSON: [[number or null, text], ...]
    token TEXT NOT NULL,            -- unguessable; a reply must know it
    ended REAL);                    -- recovered, or told to be normal
CREATE INDEX IF NOT EXISTS finding_open ON finding(job) WHERE ended IS NULL;
'''


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
        if not self.db.execute('PRAGMA user_version').fetchone()[0]:
            self.db.executescript(
                'BEGIN IMMEDIATE;' + STATE_SCHEMA + ALARM_SCHEMA
                + 'PRAGMA user_version = 1; COMMIT;')

    def change(self):
        return Change(self.db)

    def finding(self, number):
        """The Finding of that number; Error if there is none."""
        row = self.db.execute(
            'SELECT finding.*, job.name FROM finding JOIN job'
            ' ON job.id = finding.job WHERE finding.id = ?',
            (number,)).fetchone()
        if row is None:
            raise Error('no finding %s' % number)
        return Finding.of(row)


class Change:
    """A transaction that writes; rolled back if left by an exception."""

    def __init__(self, db):
        self.db = db

    def __enter__(self):
        self.db.execute('BEGIN IMMEDIATE')

    def __exit__(self, kind, *_):
        self.db.execute('ROLLBACK' if kind else 'COMMIT')


##############################################################################
# Judge
#
# The run beside the runs before it: what is usual, and what is not.  Knows
# nothing of files and of who is told.
##############################################################################

# How bad: a notice is only kept for the digest, the others are told.
NOTICE, WARNING, CRITICAL = 'notice', 'warning', 'critical'


class Finding:
    """What was not as usual, with one reason for people.

    kind is one of: new line, missing line, count, value, length, order, time,
    duration, status, absent.
    """

    __slots__ = ('id', 'job', 'at', 'kind', 'severity', 'reason', 'lines',
                 'token', 'ended')

    def __init__(self, id, job, at, kind, severity, reason, lines, token,
                 ended=None):
        self.id = id            # number in the state file
        self.job = job          # name of the job
        self.at = at            # epoch
        self.kind = kind
        self.severity = severity
        self.reason = reason    # one plain sentence
        self.lines = lines      # [[number in the mail or None, text], ...]
        self.token = token      # what a reply must know
        self.ended = ended      # epoch of recovery or of `ok`, or None

    @classmethod
    def of(cls, row):
        import json
        return cls(row['id'], row['name'], row['at'], row['kind'],
                   row['severity'], row['reason'], json.loads(row['lines']),
                   row['token'], row['ended'])

    def as_json(self):
        return {name: getattr(self, name) for name in self.__slots__
                if name != 'token'}


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

    def deliver(self, raw, now=None):
        """Judge and learn the mail `raw`; the list of Findings to be told.

        Durable on return.
        """
        return []

    def check(self, now=None):
        """The list of Findings of mails that did not come by `now`."""
        return []

    def ok(self, number, now=None):
        """What finding `number` is about is normal from now on."""

    def bad(self, number, now=None):
        """Finding `number` was right: never learn this as normal."""


##############################################################################
# Reports
#
# What it believes, and why: for people and as JSON.  Changes nothing.
##############################################################################

##############################################################################
# Commands
#
# The command line.  deliver does without argparse: it is run for each mail.
##############################################################################

OPTIONS = (ALARM_OPTIONS,)


def parser_make():
    import argparse
    parser = argparse.ArgumentParser(
        prog='cronwatch', description='Raise what is not as usual in the '
        'mails of cron.')
    parser.add_argument('--version', action='version',
                        version='cronwatch ' + VERSION)
    parser.add_argument('--dir', default=os.environ.get(
        'CRONWATCH_DIR', os.path.expanduser('~/.cronwatch')),
        help='where state.db and cronwatch.conf are')
    commands = parser.add_subparsers(dest='command', metavar='command')
    commands.add_parser('deliver', help='take a mail on standard input')
    commands.add_parser('check', help='raise mails that did not come')
    return parser


def main(argv=None):
    """Run one command; the exit status."""
    args = parser_make().parse_args(sys.argv[1:] if argv is None else argv)
    os.makedirs(args.dir, mode=0o700, exist_ok=True)
    conf = conf_read(os.path.join(args.dir, 'cronwatch.conf'), OPTIONS)
    watch = Watch(os.path.join(args.dir, 'state.db'), conf)
    if args.command == 'deliver':
        watch.deliver(sys.stdin.buffer.read())
    elif args.command == 'check':
        watch.check()
    alarms_send(watch.state, conf, time.time())
    return 0


if __name__ == '__main__':
    sys.exit(main())
