#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Months of a machine room's cron mail, made from a seed.

What comes out are whole raw mails, as cron of Debian and FreeBSD, anacron,
systemd units, wrappers and the programs themselves send them, in order of
arrival, with the truth beside them: which job sent the mail, its exit status,
and which injected fault, if any, it shows.  bench/cron.py feeds them to
cronwatch and to simpler rivals and counts; nothing here knows how any of them
decides.

The way of the data: KINDS are some fifty programs that write a report, line
by line, from a format and numbers.  A Job is one of them on one host with its
own sizes, schedule and sender, which drifts, follows the week, holidays and
summer time, is upgraded and now and then says something rare and harmless.
A Fault is put upon a few of its runs.  corpus() makes the jobs, the faults
and the mails.

Sections: Time, Runs, the kinds of jobs, Senders, Faults, Corpus.

Run as a program it writes an mbox, to look at or to feed to anything:
    cronmails.py --seed 1 --jobs 50 --days 60 > some.mbox
"""

import argparse
import base64
import datetime
import math
import random
import re
import sys

DAY = 86400
EPOCH = datetime.datetime(2024, 1, 1)
MONTHS = 'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split()
WEEKDAYS = 'Mon Tue Wed Thu Fri Sat Sun'.split()


##############################################################################
# Time: local time with summer time, holidays, schedules
#
# Times are POSIX seconds.  A schedule is local: that is what moves a mail by
# an hour twice a year.
##############################################################################

def last_sunday(year, month):
    """The last Sunday of a month of 31 days, 01:00 UTC, as a datetime."""
    day = datetime.datetime(year, month, 31, 1)
    return day - datetime.timedelta((day.weekday() + 1) % 7)


def offset(stamp, zone):
    """Seconds that local time of `zone` ('UTC' or 'CET') is before UTC."""
    if zone == 'UTC':
        return 0
    utc = datetime.datetime(1970, 1, 1) + datetime.timedelta(0, stamp)
    summer = last_sunday(utc.year, 3) <= utc < last_sunday(utc.year, 10)
    return 7200 if summer else 3600


def local(stamp, zone):
    """Local time of a POSIX time as a naive datetime."""
    return (datetime.datetime(1970, 1, 1)
            + datetime.timedelta(0, stamp + offset(stamp, zone)))


def stamp_of(moment, zone):
    """POSIX seconds of a naive local datetime."""
    stamp = (moment - datetime.datetime(1970, 1, 1)).total_seconds()
    return stamp - offset(stamp - offset(stamp, zone), zone)


def holiday(day):
    """Whether nobody works that day, weekends apart."""
    return ((day.month, day.day) in ((1, 1), (5, 1), (10, 3), (12, 24),
                                     (12, 25), (12, 26), (12, 31))
            or (day.month == 12 and day.day > 26)
            or (day.month == 8 and 5 <= day.day <= 16))


def moments(schedule, days):
    """The local start times of `schedule` over `days` days from EPOCH.

    A schedule is (every, hour, minute): every is a number of hours, 'day',
    'work', 'week0' to 'week6', 'month1' to 'month28'.
    """
    every, hour, minute = schedule
    for number in range(days):
        day = EPOCH + datetime.timedelta(number)
        if isinstance(every, int):
            for each in range(hour % every, 24, every):
                yield day.replace(hour=each, minute=minute)
        elif (every == 'day' or (every == 'work' and day.weekday() < 5)
                or every == 'week%d' % day.weekday()
                or every == 'month%d' % day.day):
            yield day.replace(hour=hour, minute=minute)


##############################################################################
# Runs: what one start of a job writes
#
# A kind calls the Run with formats and values; the format is the label of the
# line.  Numbers come from num(), so that they drift, follow the week and can
# be falsified by name without the kind knowing.
##############################################################################

class Run:
    """One run: the lines it wrote, each with its format, and its numbers."""

    def __init__(self, job, when, rng, change=None):
        self.job = job
        self.when = when            # local start, naive
        self.rng = rng
        self.change = change or {}  # number's name -> function of its value
        self.lines = []             # (format, text)
        self.numbers = {}           # name -> value given out
        self.exit = 0
        self.seconds = 5.0          # how long it ran
        self.host = job.host
        self.day = (when - EPOCH).days

    def __call__(self, form, *values):
        self.lines.append((form, form.format(*values) if values else form))

    def num(self, name, middle, spread=.08, grow=0., week=1., rows=False,
            whole=True, long=False):
        """A number of this run, known by name.

        `grow` is its growth a day, `week` the factor on days without work,
        `spread` the standard deviation of its logarithm, `rows` says that it
        is a number of like lines, `long` that it is a duration.
        """
        value = middle * self.job.scale(name) * (1 + grow * self.day)
        if self.when.weekday() > 4 or holiday(self.when):
            value *= week
        value *= math.exp(self.rng.gauss(0, spread))
        self.job.learn(name, spread, rows, long, value)
        if name in self.change:
            value = self.change[name](value)
        value = int(round(value)) if whole else value
        self.numbers[name] = value
        return value

    def percent(self, name, middle, spread=.01, grow=0.):
        """A share of something full, 1 to 100, known by name."""
        value = (middle + 8 * (self.job.scale(name) - 1)
                 + grow * self.day + self.rng.gauss(0, spread * 100))
        value = min(93, max(2, value))
        self.job.learn(name, spread, False, False, value, share=True)
        if name in self.change:
            value = min(100, max(0, self.change[name](value)))
        self.numbers[name] = int(value)
        return int(value)

    def took(self, name, middle, spread=.15, grow=0., week=1.):
        """A duration in seconds; the mail comes when it is over."""
        value = self.num(name, middle, spread, grow, week, whole=False,
                         long=True)
        self.seconds += value
        return value

    def chance(self, share):
        """True in that share of the runs."""
        return self.rng.random() < share

    def pick(self, *things):
        return self.rng.choice(things)

    def hexa(self, digits):
        """A random identity in hexadecimal digits."""
        return '%0*x' % (digits, self.rng.getrandbits(4 * digits))

    def clock(self, form='%Y-%m-%d %H:%M:%S', after=None):
        """The time now, as the program prints it."""
        passed = self.seconds if after is None else after
        return (self.when + datetime.timedelta(0, passed)).strftime(form)

    def version(self, *parts):
        """A program's version, which an upgrade moves on."""
        parts = list(parts)
        parts[-1] += self.job.upgrades(self.day)
        return '.'.join(map(str, parts))


def size(count):
    """Bytes as people print them."""
    for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
        if count < 1000 or unit == 'TB':
            return '%.2f %s' % (count, unit)
        count /= 1000


def short(count):
    """Bytes as df -h and du -h print them."""
    for unit in ('', 'K', 'M', 'G', 'T'):
        if count < 1024 or unit == 'T':
            return ('%.1f%s' if count < 10 else '%.0f%s') % (count, unit)
        count /= 1024


def hms(seconds):
    """Seconds as 0:12:34."""
    return '%d:%02d:%02d' % (seconds // 3600, seconds // 60 % 60,
                             seconds % 60)


##############################################################################
# The kinds of jobs
#
# Each is what the program of that name prints, as far as its reports are
# known, and carries lines that it prints when something is wrong (errors),
# lines that are wrong without saying so (odd), and words that change when the
# thing watched changes (states).
##############################################################################

KINDS = {}


class Kind:
    """A program that reports: its writer, schedule, sender and troubles."""

    def __init__(self, writer, schedule, sender, command, errors, odd,
                 states, subject):
        self.writer, self.schedule, self.sender = writer, schedule, sender
        self.command, self.subject = command, subject
        self.errors, self.odd, self.states = errors, odd, states
        self.name = writer.__name__.replace('_', '-')


def kind(schedule, sender, command, errors=(), odd=(), states=(),
         subject=None):
    """Register the function below as a kind of job."""
    def register(writer):
        made = Kind(writer, schedule, sender, command, errors, odd, states,
                    subject)
        KINDS[made.name] = made
        return writer
    return register


@kind(('day', 2, 10), 'wrapper', '/usr/local/sbin/borg-nightly',
      ['Connection closed by remote host. Is borg working on the server?',
       'Data integrity error: Segment entry checksum mismatch [segment 4311,'
       ' offset 1270331]',
       '/srv/data/mail/cur: open: [Errno 13] Permission denied: \'cur\''],
      ['Cache, or information obtained from the security directory is newer'
       ' than repository - this is either an attack or unsafe',
       'Remote: Using a pure-python msgpack! This will result in lower'
       ' performance.'])
def borg(r):
    files = r.num('files', 184000, .01, .0008)
    total = r.num('size', 91e9, .01, .001)
    r('Creating archive at "ssh://borg@vault/./{}::{}-{}"', r.host, r.host,
      r.clock('%Y-%m-%dT%H:%M'))
    spent = r.took('spent', 640, .2, .0008)
    r('-' * 78)
    r('Archive name: {}-{}', r.host, r.clock('%Y-%m-%dT%H:%M', 0))
    r('Archive fingerprint: {}', r.hexa(64))
    r('Time (start): {}', r.clock('%a, %Y-%m-%d %H:%M:%S', 1))
    r('Time (end):   {}', r.clock('%a, %Y-%m-%d %H:%M:%S'))
    r('Duration: {} minutes {:.2f} seconds', int(spent // 60), spent % 60)
    r('Number of files: {}', files)
    r('Utilization of max. archive size: 0%')
    r('{:<24}{:>16}{:>20}{:>20}', '', 'Original size', 'Compressed size',
      'Deduplicated size')
    new = r.num('new', 410e6, .5, 0, .4)
    r('This archive:{:>22}{:>20}{:>20}', size(total), size(total * .71),
      size(new))
    r('All archives:{:>22}{:>20}{:>20}', size(total * 22),
      size(total * 15.6), size(total * .93))
    r('Unique chunks         Total chunks')
    r('Chunk index: {:>22}{:>20}', int(files * .8), int(files * 17.3))
    for _ in range(r.num('pruned', 1, .02)):
        r('Pruning archive: {}-{} {} ({}/1)', r.host, r.clock('%Y-%m-%d', 0),
          r.clock('%a, %Y-%m-%d %H:%M:%S', -27 * DAY), 1)
    r('terminating with success status, rc 0')


@kind(('day', 3, 25), 'debian', '/root/bin/tarsnap-daily.sh',
      ['tarsnap: Too many network failures',
       'tarsnap: Error writing archive: Transaction already in progress',
       'tarsnap: Cannot stat directory /var/lib/app: No such file or'
       ' directory'],
      ['tarsnap: /home/web/upload: file changed as we read it',
       'tarsnap: account balance is below the cost of seven days'])
def tarsnap(r):
    total = r.num('total', 4.1e9, .01, .0006)
    r('Creating archive {}-{}', r.host, r.clock('%Y%m%d-%H%M%S'))
    r.took('spent', 95, .2)
    if r.chance(.04):
        r('tarsnap: Removing leading \'/\' from member names')
    r('                                       Total size  Compressed size')
    r('All archives                        {:>13} {:>16}', int(total * 31),
      int(total * 14))
    r('  (unique data)                     {:>13} {:>16}', int(total * 1.6),
      int(total * .8))
    r('This archive                        {:>13} {:>16}', total,
      int(total * .46))
    r('New data                            {:>13} {:>16}',
      r.num('new', 2.1e7, .6, 0, .3), r.num('newz', 9.3e6, .6, 0, .3))
    r('Deleting archive {}-{}', r.host,
      (r.when - datetime.timedelta(31)).strftime('%Y%m%d-%H%M%S'))


@kind(('day', 1, 0), 'systemd', 'restic-backup.service',
      ['Fatal: unable to open config file: Stat: The specified bucket does'
       ' not exist.',
       'error: lstat /srv/db/base/16384: input/output error',
       'Save(<data/7c1b90e2aa>) returned error, retrying after 552ms: dial'
       ' tcp: lookup s3.example.net: no such host'],
      ['unable to find parent snapshot, will read all files',
       'found 2 old cache directories in /root/.cache/restic, run restic'
       ' cache --cleanup'])
def restic(r):
    r('repository {} opened (version 2, compression level auto)', r.hexa(8))
    r('using parent snapshot {}', r.hexa(8))
    files = r.num('files', 61200, .01, .001)
    r('Files:       {:>5} new, {:>5} changed, {:>5} unmodified',
      r.num('new', 45, .6, 0, .2), r.num('changed', 210, .4, 0, .4), files)
    r('Dirs:        {:>5} new, {:>5} changed, {:>5} unmodified',
      r.num('dnew', 3, .8, 0, .2), r.num('dchanged', 90, .4, 0, .4),
      int(files * .14))
    r('Added to the repository: {:.3f} MiB ({:.3f} MiB stored)',
      r.num('added', 233, .5, 0, .3, whole=False),
      r.num('stored', 101, .5, 0, .3, whole=False))
    spent = r.took('spent', 210, .15, .001)
    r('processed {} files, {:.3f} GiB in {}:{:02d}', files,
      r.num('size', 17.4, .01, .001, whole=False), int(spent // 60),
      int(spent % 60))
    r('snapshot {} saved', r.hexa(8))
    r('Applying Policy: keep 14 daily, 8 weekly, 12 monthly snapshots')
    r('keep {} snapshots:', r.num('kept', 31, .01))
    r('[{}:{:02d}] 100.00%  {} / {} files deleted', 0, r.rng.randrange(9),
      1, 1)
    r('no errors were found')


@kind(('day', 4, 30), 'debian', 'rsync -a --delete --stats /srv/ nas:/srv/',
      ['rsync: [sender] read error: Connection reset by peer (104)',
       'rsync error: some files/attrs were not transferred (see previous'
       ' errors) (code 23) at main.c(1338) [sender=3.2.7]',
       'rsync: [receiver] write failed on "/srv/vm/disk2.img": No space left'
       ' on device (28)'],
      ['file has vanished: "/srv/spool/job.773"',
       'IO error encountered -- skipping file deletion'])
def rsync(r):
    files = r.num('files', 412000, .01, .0007)
    moved = r.num('moved', 830, .3, 0, .3)
    total = r.num('size', 2.3e11, .01, .0009)
    r('')
    r('Number of files: {:,} (reg: {:,}, dir: {:,}, link: {:,})', files,
      int(files * .9), int(files * .09), int(files * .01))
    r('Number of created files: {:,} (reg: {:,})', moved // 7, moved // 7)
    r('Number of deleted files: {}', r.num('deleted', 40, .6, 0, .3))
    r('Number of regular files transferred: {:,}', moved)
    r('Total file size: {:,} bytes', total)
    r('Total transferred file size: {:,} bytes',
      r.num('bytes', 8.1e8, .4, 0, .3))
    r('Literal data: {:,} bytes', r.num('literal', 3.3e8, .4, 0, .3))
    r('Matched data: {:,} bytes', r.num('matched', 4.8e8, .4, 0, .3))
    r('File list size: {:,}', int(files * 22.1))
    r('File list generation time: {:.3f} seconds', r.rng.random())
    r('File list transfer time: 0.000 seconds')
    sent = r.num('sent', 3.4e8, .4, 0, .3)
    speed = r.took('spent', 300, .2)
    r('Total bytes sent: {:,}', sent)
    r('Total bytes received: {:,}', int(sent / 90))
    r('')
    r('sent {:,} bytes  received {:,} bytes  {:,.2f} bytes/sec', sent,
      int(sent / 90), sent / speed)
    r('total size is {:,}  speedup is {:.2f}', total, total / sent)


@kind((4, 0, 0), 'debian', '/usr/bin/rsnapshot hourly',
      ['ERROR: /usr/bin/rsync returned 12 while processing'
       ' root@app1:/etc/',
       'rsnapshot encountered an error! The program was invoked with these'
       ' options:'],
      ['WARNING: Lockfile /var/run/rsnapshot.pid exists but no such process,'
       ' removing it'])
def rsnapshot(r):
    r('echo {} > /var/run/rsnapshot.pid', r.rng.randrange(900, 32000))
    for number in range(5, 0, -1):
        r('mv /snap/hourly.{}/ /snap/hourly.{}/', number - 1, number)
    for name in ('etc', 'home', 'srv', 'var/www'):
        r('/usr/bin/rsync -a --delete --numeric-ids --relative'
          ' --delete-excluded root@{}:/{}/ /snap/hourly.0/{}/', r.host, name,
          r.host)
    r.took('spent', 160, .2)
    r('touch /snap/hourly.0/')
    r('rm -f /var/run/rsnapshot.pid')


@kind(('day', 0, 40), 'debian', 'duplicity incr /home s3://bucket/home',
      ['Giving up after 5 attempts. S3ResponseError: 403 Forbidden',
       'Fatal Error: Backup source directory has inconsistent metadata',
       'GPGError: GPG Failed, see log below:'],
      ['Warning, found incomplete backup sets, probably left from aborted'
       ' session',
       'Last full backup is too old, forcing full backup'])
def duplicity(r):
    r('Local and Remote metadata are synchronized, no sync needed.')
    r('Last full backup date: {}',
      (r.when - datetime.timedelta(r.day % 30)).strftime(
          '%a %b %d %H:%M:%S %Y'))
    r('--------------[ Backup Statistics ]--------------')
    begin = int(stamp_of(r.when, 'CET'))
    r('StartTime {}.{:02d} ({})', begin, r.rng.randrange(100),
      r.clock('%a %b %d %H:%M:%S %Y', 0))
    spent = r.took('spent', 82, .2)
    r('EndTime {}.{:02d} ({})', int(begin + spent), r.rng.randrange(100),
      r.clock('%a %b %d %H:%M:%S %Y'))
    r('ElapsedTime {:.2f} ({:.2f} seconds)', spent, spent)
    files = r.num('files', 23100, .01, .0006)
    total = r.num('size', 9.9e9, .01, .001)
    r('SourceFiles {}', files)
    r('SourceFileSize {} ({:.2f} GB)', total, total / 1e9)
    r('NewFiles {}', r.num('new', 40, .6, 0, .2))
    r('DeletedFiles {}', r.num('gone', 12, .7, 0, .2))
    r('ChangedFiles {}', r.num('changed', 160, .4, 0, .3))
    r('RawDeltaSize {} ({:.1f} MB)', r.num('delta', 4.4e7, .5, 0, .3), 44.1)
    r('Errors 0')
    r('-------------------------------------------------')


@kind(('day', 2, 45), 'debian', '/usr/local/bin/pgdump-all',
      ['pg_dump: error: connection to server on socket'
       ' "/var/run/postgresql/.s.PGSQL.5432" failed: FATAL:  the database'
       ' system is starting up',
       'pg_dump: error: Dumping the contents of table "events" failed:'
       ' PQgetResult() failed.',
       'pg_dump: detail: Error message from server: ERROR:  invalid page in'
       ' block 871 of relation base/16401/24577'],
      ['pg_dump: NOTICE:  table "sessions" has circular foreign keys',
       'note: collation version mismatch in database "shop"'])
def pgdump(r):
    r('Starting dump of cluster main on {} at {}', r.host, r.clock())
    rows = r.num('bases', 9, .01, rows=True)
    for number in range(rows):
        name = ('shop', 'crm', 'wiki', 'billing', 'tickets', 'auth', 'stats',
                'forum', 'stock', 'hr')[number % 10] + (
                    '' if number < 10 else str(number))
        spent = r.took('t' + name, 31, .15, .001)
        r('dumped {}: {} in {:.1f} s', name,
          size(r.num('s' + name, 3.1e8, .03, .002)), spent)
    r('Removing dumps older than 14 days: {} removed', rows)
    r('All dumps finished at {}', r.clock())


@kind(('day', 23, 15), 'wrapper', '/opt/scripts/mysql-backup',
      ['mysqldump: Got error: 1045: Access denied for user'
       ' \'backup\'@\'localhost\' (using password: YES) when trying to'
       ' connect',
       'mysqldump: Error 2013: Lost connection to MySQL server during query'
       ' when dumping table `orders` at row: 118201',
       'gzip: stdout: No space left on device'],
      ['-- Warning: column statistics not supported by the server.',
       'Replica is 7312 seconds behind source'],
      [('Slave_IO_Running: Yes', 'Slave_IO_Running: Connecting'),
       ('Slave_SQL_Running: Yes', 'Slave_SQL_Running: No')])
def mysql(r):
    r('*** mysql backup {} ***', r.clock('%d.%m.%Y %H:%M'))
    r('Slave_IO_Running: Yes')
    r('Slave_SQL_Running: Yes')
    r('Seconds_Behind_Master: {}', r.rng.choice((0, 0, 0, 0, 1, 2)))
    for table in range(r.num('tables', 24, .005, rows=True)):
        r('  {:<28} {:>10} rows', 'table_%02d' % table,
          r.num('rows%d' % table, 21000, .02, .002))
    r.took('spent', 240, .15)
    r('Backup size: {}', size(r.num('size', 6.2e9, .01, .0015)))
    r('Copied to nas2:/backup/mysql/{}.sql.gz', r.clock('%Y%m%d', 0))
    r('Done.')


@kind(('day', 5, 5), 'freebsd', '/usr/local/bin/mongo-backup.sh',
      ['Failed: error connecting to db server: no reachable servers',
       'Failed: error writing data for collection `app.log` to disk: short'
       ' write'],
      ['there are 2 replica set members not in sync, using the primary'])
def mongo(r):
    for name in ('app.users', 'app.orders', 'app.log', 'app.files.chunks'):
        r('{}\twriting {} to /backup/mongo/{}/{}.bson',
          r.clock('%Y-%m-%dT%H:%M:%S.') + '%03d+0100' % r.rng.randrange(1000),
          name, r.clock('%F', 0), name.replace('.', '/'))
        r.took('t' + name, 14, .2)
        r('{}\tdone dumping {} ({} documents)',
          r.clock('%Y-%m-%dT%H:%M:%S.') + '%03d+0100' % r.rng.randrange(1000),
          name, r.num(name, 52000, .01, .0015))


@kind(('week6', 4, 15), 'debian', '/usr/local/bin/sqlite-maintain',
      ['Error: database disk image is malformed',
       'Error: stepping, database is locked (5)'],
      ['*** in database main *** Page 3120: btreeInitPage() returns code 11'],
      [('ok', 'row 88 missing from index sqlite_autoindex_jobs_1')])
def sqlite(r):
    for name in ('jobs', 'cache', 'inbox'):
        r('{}.db integrity: ok', name)
        before = r.num(name, 9.1e7, .05, .003)
        r('{}.db vacuum: {} -> {}', name, short(before), short(before * .82))
    r.took('spent', 40, .3)


@kind(('day', 6, 0), 'debian', 'vacuumdb --all --analyze --verbose | tail',
      ['vacuumdb: error: vacuuming of database "crm" failed: ERROR:  could'
       ' not access status of transaction 88112',
       'ERROR:  deadlock detected'],
      ['WARNING:  database "stats" must be vacuumed within 9871132'
       ' transactions'])
def vacuum(r):
    for name in ('crm', 'shop', 'stats', 'wiki'):
        r('vacuumdb: vacuuming database "{}"', name)
        for table in range(r.num('n' + name, 6, .005, rows=True)):
            r('INFO:  table "{}": found {} removable, {} nonremovable row'
              ' versions in {} pages', '%s_%d' % (name, table),
              r.num('dead', 900, .8, 0, .3),
              r.num('live%s%d' % (name, table), 64000, .02, .001),
              r.rng.randrange(300, 4000))
    r('CPU: user: {:.2f} s, system: {:.2f} s, elapsed: {:.2f} s',
      r.rng.random() * 9, r.rng.random(), r.took('spent', 50, .2))


@kind(('day', 6, 25), 'anacron', 'logrotate',
      ['error: skipping "/var/log/nginx/access.log" because parent directory'
       ' has insecure permissions',
       'error: error running shared postrotate script for \'/var/log/app.log'
       ' \'',
       'gzip: stdin: unexpected end of file'],
      ['warning: state file /var/lib/logrotate/status is world-readable and'
       ' thus can be locked'])
def logrotate(r):
    r('reading config file /etc/logrotate.conf')
    r('including /etc/logrotate.d')
    r('Handling {} logs', r.num('logs', 14, .001))
    for number, name in enumerate(('syslog', 'auth.log', 'kern.log',
                                   'nginx/access.log', 'nginx/error.log',
                                   'apt/term.log')):
        r('rotating pattern: /var/log/{}  after 1 days ({} rotations)', name,
          14)
        if number > 3 and r.when.weekday() % 3:
            r('  log does not need rotating (log has been rotated at {})',
              r.clock('%Y-%m-%d %H:%M', -DAY))
        else:
            r('  log needs rotating')
            r('compressing log with: /bin/gzip')
    r.took('spent', 12, .3)


@kind(('day', 6, 50), 'app', 'unattended-upgrade',
      ['dpkg: error processing package postgresql-15 (--configure):',
       ' subprocess installed post-installation script returned error exit'
       ' status 1',
       'E: Sub-process /usr/bin/dpkg returned an error code (1)'],
      ['Package linux-image-amd64 is kept back because a related package is'
       ' kept back or due to local apt_preferences(5).'],
      [('All upgrades installed', 'Installing the upgrades FAILED!')],
      subject='[{state}] unattended-upgrades result for {host}: SUCCESS')
def unattended(r):
    r('Unattended upgrade result: All upgrades installed')
    r('')
    packages = r.rng.sample(PACKAGES, max(1, min(len(PACKAGES), r.num(
        'packages', 3, .6, 0, .5))))
    r('Packages that were upgraded:')
    r(' {}', ' '.join(packages))
    r('')
    r('Package installation log:')
    r('Log started: {}', r.clock('%Y-%m-%d  %H:%M:%S'))
    r('(Reading database ... {} files and directories currently'
      ' installed.)', r.num('installed', 61200, .001, .0002))
    for package in packages:
        old = '%d.%d.%d-%d' % tuple(r.rng.randrange(1, 30) for _ in 'abcd')
        r('Preparing to unpack .../{}_{}_amd64.deb ...', package, old + 'u1')
        r('Unpacking {} ({}) over ({}) ...', package, old + 'u1', old)
        r('Setting up {} ({}) ...', package, old + 'u1')
    r.took('spent', 45, .5)
    if r.chance(.3):
        r('Processing triggers for man-db (2.11.2-2) ...')
    if r.chance(.3):
        r('Processing triggers for libc-bin (2.36-9) ...')
    r('Log ended: {}', r.clock('%Y-%m-%d  %H:%M:%S'))


PACKAGES = ('curl libcurl4 openssl libssl3 nginx tzdata bind9-host libxml2'
            ' python3.11 git linux-libc-dev base-files gnupg gpgv dbus'
            ' php8.2-cli php8.2-common vim-common xxd libgnutls30 sudo'
            ' openssh-server openssh-client rsync krb5-locales libc6'
            ' locales libnss3 ghostscript samba-libs ntpsec').split()


@kind(('work', 7, 20), 'debian', 'apticron --cron',
      ['W: GPG error: http://deb.debian.org bookworm InRelease: The following'
       ' signatures were invalid: EXPKEYSIG 0E98404D386FA1D9',
       'E: Repository \'http://deb.debian.org bookworm-updates Release\' does'
       ' not have a Release file anymore.'],
      ['The repository http://mirror.example.org is not used: clock is ahead'
       ' by 3 days'])
def apticron(r):
    if r.chance(.45):
        return
    r('apticron report [{}]', r.clock('%a, %d %b %Y %H:%M:%S +0100'))
    r('=' * 72)
    r('apticron has detected that some packages need upgrading on:')
    r('\t{}', r.host)
    r('\t[ {} ]', '10.1.7.%d' % (len(r.host) + 9))
    r('The following packages are currently pending an upgrade:')
    for package in r.rng.sample(PACKAGES, r.rng.randrange(1, 9)):
        r('\t{} {}.{}-{}', package, r.rng.randrange(9), r.rng.randrange(40),
          r.rng.randrange(9))
    r('You can perform the upgrade by issuing the command:')
    r('\taptitude full-upgrade')
    r.took('spent', 9, .4)


@kind((12, 3, 41), 'debian', 'certbot renew --post-hook "nginx -s reload"',
      ['Failed to renew certificate www.example.org with error: Some'
       ' challenges have failed.',
       'All renewals failed. The following certificates could not be'
       ' renewed:',
       'urn:ietf:params:acme:error:rateLimited :: too many certificates'],
      ['Attempting to parse the version 2.9.0 renewal configuration file with'
       ' version 2.1.0 of Certbot. This might not work.'])
def certbot(r):
    r('Saving debug log to /var/log/letsencrypt/letsencrypt.log')
    for name in ('www.example.org', 'mail.example.org', 'git.example.org'):
        r('Processing /etc/letsencrypt/renewal/{}.conf', name)
        age = (r.day + len(name) * 7) % 60
        if age == 0:
            r('Renewing an existing certificate for {}', name)
        else:
            r('Certificate not yet due for renewal')
        r.took('t' + name, 2, .3)
    r('The following certificates are not due for renewal yet:')
    for name in ('www.example.org', 'mail.example.org', 'git.example.org'):
        age = (r.day + len(name) * 7) % 60
        r('  /etc/letsencrypt/live/{}/fullchain.pem expires on {} (skipped)',
          name, (r.when + datetime.timedelta(90 - age)).strftime('%Y-%m-%d'))
    r('No renewals were attempted.')


@kind(('day', 0, 17), 'freebsd', '"/root/.acme.sh"/acme.sh --cron',
      ['Please check log file for more details: /root/.acme.sh/acme.sh.log',
       'Error renew shop.example.com_ecc.', 'Verify error:DNS problem:'
       ' NXDOMAIN looking up TXT for _acme-challenge.shop.example.com'],
      ['It seems that you are using a deprecated dns hook'])
def acme(r):
    zone = '[%s CET]'
    r('{} ===Starting cron===', zone % r.clock('%a %b %e %H:%M:%S %Y'))
    for name in ('shop.example.com', 'api.example.com'):
        r('{} Renew: \'{}\'', zone % r.clock('%a %b %e %H:%M:%S %Y'), name)
        r('{} Skip, Next renewal time is: {}',
          zone % r.clock('%a %b %e %H:%M:%S %Y'),
          (r.when + datetime.timedelta(60 - (r.day + len(name)) % 60)
           ).strftime('%Y-%m-%dT%H:%M:%SZ'))
        r.took('t' + name, 1, .3)
    r('{} ===End cron===', zone % r.clock('%a %b %e %H:%M:%S %Y'))


@kind(('week6', 0, 57), 'debian', '/usr/share/mdadm/checkarray --all --idle',
      ['checkarray: E: failed to read sync_action of md0',
       'mdadm: error opening /dev/md1: No such file or directory'],
      ['checkarray: I: array md0 in auto-read-only state, skipping...'])
def checkarray(r):
    for name in ('md0', 'md1', 'md2'):
        r('checkarray: I: check queued for array {}.', name)
        r('checkarray: I: selecting idle I/O scheduling class and 15'
          ' niceness for resync of {}.', name)
    r('mismatch_cnt: {}', 0)
    r('last check took {} minutes', int(r.took('spent', 9000, .05, .0002)
                                        // 60))


@kind(('day', 7, 0), 'debian', 'cat /proc/mdstat; mdadm --detail /dev/md0',
      ['mdadm: cannot open /dev/md0: No such device'],
      ['      [>....................]  recovery =  2.1% (20113/976630464)'
       ' finish=412.8min speed=39412K/sec'],
      [('[UU]', '[U_]'), ('State : clean', 'State : clean, degraded'),
       ('Failed Devices : 0', 'Failed Devices : 1'),
       ('active sync   /dev/sdb1', 'faulty   /dev/sdb1')])
def mdstat(r):
    r('Personalities : [raid1] [linear] [raid6]')
    r('md0 : active raid1 sdb1[1] sda1[0]')
    r('      976630464 blocks super 1.2 [2/2] [UU]')
    r('      bitmap: {}/8 pages [{}KB], 65536KB chunk', r.rng.randrange(5),
      r.rng.randrange(5) * 4)
    r('unused devices: <none>')
    r('     Raid Level : raid1')
    r('    Update Time : {}', r.clock('%a %b %d %H:%M:%S %Y', -9))
    r('          State : clean')
    r('  Active Devices : 2')
    r('  Failed Devices : 0')
    r('         Events : {}', 41000 + r.day * 3 + r.rng.randrange(3))
    r('       0       8        1        0      active sync   /dev/sda1')
    r('       1       8       17        1      active sync   /dev/sdb1')


@kind(('day', 7, 10), 'debian', '/usr/local/bin/smart-report',
      ['Smartctl open device: /dev/sdb failed: No such device',
       'Error 12 occurred at disk power-on lifetime: 31021 hours'],
      ['197 Current_Pending_Sector  0x0012   100   100   000    Old_age'
       '   Always       -       8'],
      [('test result: PASSED', 'test result: FAILED!'),
       ('Completed without error', 'Completed: read failure')])
def smart(r):
    for disk in ('sda', 'sdb', 'sdc'):
        r('=== /dev/{} ===', disk)
        r('SMART overall-health self-assessment test result: PASSED')
        r('  5 Reallocated_Sector_Ct   0x0033   100   100   010    Pre-fail'
          '  Always       -       0')
        r('  9 Power_On_Hours          0x0032   092   092   000    Old_age'
          '   Always       -       {}', 31000 + r.day * 24)
        r('194 Temperature_Celsius     0x0022   064   050   000    Old_age'
          '   Always       -       {}', r.num('c' + disk, 36, .03))
        r('# 1  Short offline       Completed without error       00%'
          '     {}         -', 31000 + r.day * 24 - 5)


@kind(('day', 8, 0), 'debian', 'df -hP -x tmpfs',
      ['df: /mnt/nas: Stale file handle',
       'df: /mnt/backup: Transport endpoint is not connected'],
      ['overlay         20G   19G  1.0G  95% /var/lib/docker/overlay2'])
def df(r):
    r('Filesystem      Size  Used Avail Use% Mounted on')
    for name, total, share, grow in (
            ('/dev/sda1', 40, 52, .02), ('/dev/sda2', 200, 61, .05),
            ('/dev/mapper/vg0-srv', 900, 44, .04),
            ('nas:/export', 7300, 70, .02)):
        used = r.percent(name, share, .004, grow)
        r('{:<15} {:>4}G {:>4}G {:>4}G  {:>2}% /{}', name, total,
          total * used // 100, total * (100 - used) // 100, used,
          name.rsplit('/', 1)[-1])


@kind((1, 0, 5), 'wrapper', '/usr/local/bin/check-space',
      ['cannot read quota of /home: Permission denied',
       'du: cannot access \'/srv/spool/tmp1\': Input/output error'],
      ['/srv is mounted read-only'])
def space(r):
    for name in ('/', '/home', '/srv', '/var'):
        r('{}: {}% used, {} inodes free', name,
          r.percent('p' + name, 55, .006, .03),
          r.num('i' + name, 812000, .02))
    r.took('spent', 2, .2)


@kind(('week0', 9, 0), 'freebsd', 'zpool status -v; zpool list',
      ['errors: Permanent errors have been detected in the following files:',
       'cannot open \'tank\': pool I/O is currently suspended'],
      ['status: Some supported features are not enabled on the pool. The pool'
       ' can still be used',
       '    spare-1    INUSE     0     0     0'],
      [(' state: ONLINE', ' state: DEGRADED'),
       ('errors: No known data errors', 'errors: 3 data errors, use \'-v\' for'
        ' a list'), ('ada1      ONLINE       0     0     0',
                     'ada1      FAULTED      4    91     0')])
def zpool(r):
    r('  pool: tank')
    r(' state: ONLINE')
    r('  scan: scrub repaired 0B in {} with 0 errors on {}',
      hms(r.num('scrub', 16000, .03, .001)),
      r.clock('%a %b %e %H:%M:%S %Y', -DAY))
    r('config:')
    r('\tNAME        STATE     READ WRITE CKSUM')
    r('\ttank        ONLINE       0     0     0')
    r('\t  mirror-0  ONLINE       0     0     0')
    r('\t    ada0      ONLINE       0     0     0')
    r('\t    ada1      ONLINE       0     0     0')
    r('errors: No known data errors')
    r('NAME   SIZE  ALLOC   FREE  CKPOINT  FRAG    CAP  DEDUP  HEALTH')
    full = r.percent('full', 50, .004, .05)
    r('tank  3.62T  {:.2f}T  {:.2f}T        -   {}%    {}%  1.00x  ONLINE',
      3.62 * full / 100, 3.62 * (1 - full / 100), r.percent('frag', 12, .005),
      full)


@kind(('day', 3, 1), 'app', 'periodic daily',
      ['Checking for rejected mail hosts: mail.log: No such file or'
       ' directory',
       'ls: /var/backups/aliases.bak: Permission denied'],
      ['ada1: 512 bytes/sector, SMART trip pending'],
      [('pool \'zroot\' is healthy', 'pool \'zroot\' is degraded'),
       ('Checking for packages with security vulnerabilities:',
        'Checking for packages with mismatched checksums:')],
      subject='{host} daily run output')
def periodic(r):
    r('Removing stale files from /var/preserve:')
    r('Cleaning out old system announcements:')
    r('Backup passwd and group files:')
    r('Verifying group file syntax:')
    r('/etc/group is fine')
    r('Backing up package db')
    r('Disk status:')
    r('Filesystem         Size    Used   Avail Capacity  Mounted on')
    full = r.percent('full', 40, .006, .03)
    r('zroot/ROOT/default  91G     {}G     {}G    {}%    /', 91 * full // 100,
      91 - 91 * full // 100, full)
    r('Network interface status:')
    for name in ('em0', 'lo0'):
        r('{}  {}  <Link#{}>  {}  0  0  {}  0', name, 1500, 1,
          r.num('in' + name, 9.1e6, .2, 0, .5),
          r.num('out' + name, 7.7e6, .2, 0, .5))
    r('Local system status:')
    r('{}  up {} days, {:>5}, {} users, load averages: {:.2f}, {:.2f}, {:.2f}',
      r.clock('%I:%M%p', 0), r.day % 91 + 2, r.clock('%H:%M'),
      r.rng.randrange(3), *[r.rng.random() / 2 for _ in 'abc'])
    r('Mail in local queue:')
    r('mailq: Mail queue is empty')
    r('pool \'zroot\' is healthy')
    r('Security check:')
    r('    (output mailed separately)')
    if r.chance(.2):
        r('Rotating accounting logs and gathering statistics:')
    r('-- End of daily output --')


@kind(('day', 3, 4), 'app', 'periodic security',
      ['kernel: ada0: uncorrectable ECC error',
       'pid 911 (nginx), jid 0, uid 80: exited on signal 11 (core dumped)'],
      ['+root:*:0:0::0:0:Charlie &:/root:/bin/sh  (second entry)'],
      subject='{host} daily security run output')
def security(r):
    r('Checking setuid files and devices:')
    r('Checking negative group permissions:')
    r('Checking for uids of 0:')
    r('root 0')
    r('toor 0')
    r('Checking for passwordless accounts:')
    r('{} login failures:', r.host)
    for _ in range(r.num('fails', 7, .35, rows=True)):
        r('{} {} sshd[{}]: Failed password for root from {} port {} ssh2',
          r.clock('%b %e %H:%M:%S', -r.rng.randrange(DAY)), r.host,
          r.rng.randrange(900, 99999), address(r.rng),
          r.rng.randrange(1024, 65535))
    r('{} refused connections:', r.host)
    r('-- End of security output --')


def address(rng):
    """Some IPv4 address of the documentation's nets or none in particular."""
    return '%d.%d.%d.%d' % (rng.choice((45, 92, 103, 185, 198, 203)),
                            rng.randrange(256), rng.randrange(256),
                            rng.randrange(1, 255))


@kind(('day', 5, 55), 'app', 'logwatch',
      [' *Fatal* Kernel panic - not syncing: VFS: Unable to mount root fs',
       '    EXT4-fs error (device sda2): ext4_lookup: 1 Time(s)'],
      ['    New user account created: toor2 (uid=0)'],
      subject='Logwatch for {host} (Linux)')
def logwatch(r):
    r(' ################### Logwatch 7.7 (07/22/22) ####################')
    r('        Processing Initiated: {}', r.clock('%a %b %e %H:%M:%S %Y'))
    r('        Date Range Processed: yesterday')
    r('      Logfiles for Host: {}', r.host)
    r(' --------------------- SSHD Begin ------------------------')
    r(' Users logging in through sshd:')
    for user in ('ops', 'backup', 'anna'):
        r('    {}:', user)
        r('       {} ({}): {} Times', '10.1.7.4', 'desk.example.org',
          r.num('login' + user, 14, .3, 0, .2))
    r(' Received disconnect:')
    r('    11: Bye Bye : {} Time(s)', r.num('byes', 310, .4))
    r(' ---------------------- SSHD End -------------------------')
    r(' --------------------- Postfix Begin ------------------------')
    r('   {:>8}   Bytes accepted', r.num('accepted', 8812000, .3, 0, .3))
    r('   {:>8}   Sent via SMTP', r.num('smtp', 412, .25, 0, .3))
    r('   {:>8}   Connections', r.num('connections', 930, .25, 0, .5))
    if r.chance(.25):
        r('   {:>8}   Connections lost (inbound)', r.rng.randrange(1, 9))
    r(' ---------------------- Postfix End -------------------------')
    r(' --------------------- Disk Space Begin ------------------------')
    full = r.percent('full', 47, .005, .03)
    r(' /dev/sda1        40G  {}G  {}G  {}% /', 40 * full // 100,
      40 - 40 * full // 100, full)
    r(' ---------------------- Disk Space End -------------------------')
    r(' ###################### Logwatch End #########################')


@kind(('day', 8, 30), 'debian', '/usr/local/bin/fail2ban-summary',
      ['ERROR   Failed to access socket path: /var/run/fail2ban/'
       'fail2ban.sock. Is fail2ban running?'],
      ['jail recidive has been stopped'])
def fail2ban(r):
    for jail in ('sshd', 'postfix', 'nginx-auth'):
        r('Status for the jail: {}', jail)
        r('|  |- Currently failed: {}', r.rng.randrange(12))
        r('|  `- Total failed:     {}', r.num('f' + jail, 900, .3))
        r('   |- Currently banned: {}', r.num('b' + jail, 60, .25))
    for _ in range(r.num('banned', 14, .2, rows=True)):
        r('   `- {} banned {} times', address(r.rng), r.rng.randrange(1, 6))


@kind((6, 1, 30), 'debian', 'postqueue -p | tail -n 30',
      ['postqueue: fatal: Queue report unavailable - mail system is down'],
      ['mail for example.net is being held by an operator'])
def mailqueue(r):
    waiting = r.rng.choice((0, 0, 1, 2, 3, 5))
    if not waiting:
        r('Mail queue is empty')
        return
    r('-Queue ID-  --Size-- ----Arrival Time---- -Sender/Recipient-------')
    for _ in range(waiting):
        r('{:10}  {:>7} {} {}', r.hexa(10).upper(),
          r.rng.randrange(800, 90000), r.clock(
              '%a %b %d %H:%M:%S', -r.rng.randrange(9 * 3600)),
          'news@example.org')
        r('(connect to {}[{}]:25: Connection timed out)',
          'mx%d.example.net' % r.rng.randrange(9), address(r.rng))
        r('                                         {}@example.net',
          r.pick('anna', 'ben', 'carla', 'dora', 'emil'))
    r('-- {} Kbytes in {} Requests.', r.rng.randrange(4, 300), waiting)


@kind(('day', 0, 25), 'debian', 'pflogsumm -d yesterday /var/log/mail.log.1',
      ['pflogsumm: cannot open /var/log/mail.log.1: Permission denied'],
      ['Warnings: pickup (total: 1)  1  maildrop/8A1F: world writable'])
def pflogsumm(r):
    r('Postfix log summaries for {}', r.clock('%b %e', -DAY))
    r('Grand Totals')
    r('messages')
    got = r.num('received', 1720, .12, 0, .35)
    r('{:>7}   received', got)
    r('{:>7}   delivered', r.num('delivered', 1790, .12, 0, .35))
    r('{:>7}   forwarded', 0)
    r('{:>7}   deferred  ({} deferrals)', r.rng.randrange(20),
      r.rng.randrange(90))
    r('{:>7}   bounced', r.num('bounced', 9, .4, 0, .5))
    r('{:>7}   rejected ({}%)', r.num('rejected', 820, .2), 31)
    r('{:>6}m  bytes received', r.num('megas', 88, .2, 0, .35))
    r('Per-Hour Traffic Summary')
    for hour in range(24):
        r('    {:04d}-{:04d}  {:>10} {:>10} {:>10}', hour * 100,
          hour * 100 + 100, int(got / 24 * r.rng.random() * 2),
          int(got / 24 * r.rng.random() * 2), r.rng.randrange(9))
    r('Host/Domain Summary: Message Delivery (top 5)')
    for _ in range(5):
        r(' {:>6} {:>7}k  {} {:.1f} s  {}', r.rng.randrange(10, 900),
          r.rng.randrange(90, 9000), r.rng.randrange(3),
          r.rng.random() * 9, r.pick('example.org', 'example.com',
                                     'mail.example.net', 'list.example.edu'))


@kind(('day', 6, 26), 'debian', '/usr/bin/rkhunter --cronjob --summary',
      ['Warning: The file properties have changed: File: /usr/bin/ssh',
       'Error: Unable to write to /var/lib/rkhunter/tmp'],
      ['Possible rootkit: 1 (Suckit Rootkit string found)'],
      [('Suspect files: 0', 'Suspect files: 2'),
       ('Possible rootkits: 0', 'Possible rootkits: 1')])
def rkhunter(r):
    r('System checks summary')
    r('=====================')
    r('File properties checks...')
    r('    Files checked: {}', r.num('files', 143, .001))
    r('    Suspect files: 0')
    r('Rootkit checks...')
    r('    Rootkits checked : {}', 498)
    r('    Possible rootkits: 0')
    r('Applications checks...')
    r('    All checks skipped')
    spent = r.took('spent', 130, .12)
    r('The system checks took: {} minutes and {} seconds', int(spent // 60),
      int(spent % 60))
    r('All results have been written to the log file: /var/log/rkhunter.log')


@kind(('day', 6, 27), 'anacron', 'chkrootkit',
      ['Checking `lkm\'... You have     3 process hidden for readdir command',
       'chkproc: Warning: Possible LKM Trojan installed'],
      ['eth1: PACKET SNIFFER(/usr/sbin/tcpdump[4411])'],
      [('Checking `ls\'... not infected', 'Checking `ls\'... INFECTED')])
def chkrootkit(r):
    for name in ('amd', 'basename', 'cron', 'date', 'du', 'ls', 'netstat',
                 'passwd', 'ps', 'sshd', 'tar', 'top', 'w'):
        r('Checking `{}\'... not infected', name)
    r('Searching for suspicious files and dirs, it may take a while...')
    r('Checking `sniffer\'... eth0: not promisc and no packet sniffer sockets')
    r.took('spent', 60, .2)


@kind(('day', 4, 4), 'app', 'aide --check',
      ['ERROR: cannot read database /var/lib/aide/aide.db: IO error'],
      ['f = p..g.... : /usr/sbin/sshd'],
      subject='[AIDE] {host}: AIDE 0.18.3 daily report')
def aide(r):
    changed = r.rng.choice((0, 0, 0, 1, 2, 3))
    r('Start timestamp: {} (AIDE 0.18.3)', r.clock('%F %T +0100', 0))
    r('AIDE found differences between database and filesystem!!' if changed
      else 'AIDE found NO differences between database and filesystem.'
           ' Looks okay!!')
    r('  Total number of entries:\t{}', r.num('entries', 150220, .001,
                                             .0001))
    if changed:
        r('  Changed entries:\t\t{}', changed)
        for _ in range(changed):
            r('f >.... mc..H.. . : /var/log/{}', r.pick(
                'lastlog', 'wtmp', 'dpkg.log', 'alternatives.log'))
    r('End timestamp: {} (run time: {}m {}s)', r.clock('%F %T +0100'),
      int(r.took('spent', 250, .15) // 60), r.rng.randrange(60))


@kind(('day', 1, 30), 'debian', 'clamscan -ri /home',
      ['/home/anna/Downloads/rechnung.zip: Win.Trojan.Agent-1 FOUND',
       'LibClamAV Error: cli_loaddbdir: No supported database files found'],
      ['LibClamAV Warning: **  The virus database is older than 7 days! **'],
      [('Infected files: 0', 'Infected files: 3')])
def clamscan(r):
    r('----------- SCAN SUMMARY -----------')
    r('Known viruses: {}', 8670000 + r.day * 41)
    r('Engine version: {}', r.version(1, 0, 3))
    r('Scanned directories: {}', r.num('dirs', 41000, .01, .0006))
    r('Scanned files: {}', r.num('files', 201000, .01, .0007))
    r('Infected files: 0')
    r('Data scanned: {:.2f} MB', r.num('data', 91000, .02, .0007,
                                       whole=False))
    spent = r.took('spent', 3100, .08, .0005)
    r('Time: {:.3f} sec ({} m {} s)', spent, int(spent // 60),
      int(spent % 60))
    r('Start Date: {}', r.clock('%Y:%m:%d %H:%M:%S', 0))
    r('End Date:   {}', r.clock('%Y:%m:%d %H:%M:%S'))


@kind((6, 0, 47), 'freebsd', '/usr/local/bin/freshclam --stdout',
      ['ERROR: Can\'t download daily.cvd from database.clamav.net',
       'ERROR: Database update process failed: Connection failed (5)'],
      ['WARNING: Your ClamAV installation is OUTDATED!'])
def freshclam(r):
    now = r.clock('%a %b %e %H:%M:%S %Y')
    r('{} -> ClamAV update process started at {}', now, now)
    number = 27100 + r.day
    if r.when.hour < 6:
        r('{} -> daily.cld updated (version: {}, sigs: {}, f-level: 90,'
          ' builder: raynman)', now, number, 2050000 + r.day * 41)
    else:
        r('{} -> daily.cld database is up-to-date (version: {}, sigs: {},'
          ' f-level: 90, builder: raynman)', now, number,
          2050000 + r.day * 41)
    r('{} -> main.cvd database is up-to-date (version: 62, sigs: 6647427,'
      ' f-level: 90, builder: sigmgr)', now)
    r.took('spent', 6, .4)


@kind((6, 0, 20), 'debian', '/usr/local/bin/ntp-check',
      ['ntpq: read: Connection refused', 'no server suitable for'
       ' synchronization found'],
      ['clock was stepped'], [('stratum 2', 'stratum 16'),
                              ('synchronised to NTP server',
                               'unsynchronised')])
def ntp(r):
    r('synchronised to NTP server ({}) at stratum 2', '192.0.2.123')
    r('   time correct to within {} ms', r.num('within', 21, .2))
    r('   polling server every {} s', 1024)
    r('offset {:+.3f} ms, jitter {:.3f} ms', r.rng.gauss(0, .4),
      r.num('jitter', .8, .3, whole=False))


@kind(('week6', 3, 33), 'debian', 'docker system prune -f',
      ['Cannot connect to the Docker daemon at unix:///var/run/docker.sock.'
       ' Is the docker daemon running?',
       'Error response from daemon: a prune operation is already running'],
      ['WARNING: image registry.example.org/app is used by no tag'])
def docker(r):
    r('Deleted Containers:')
    for _ in range(r.rng.randrange(2, 7)):
        r('{}', r.hexa(64))
    r('Deleted Images:')
    for _ in range(r.rng.randrange(4, 16)):
        r('deleted: sha256:{}', r.hexa(64))
    r.took('spent', 30, .3)
    r('Total reclaimed space: {}', size(r.num('space', 3.3e9, .25)))


@kind((6, 3, 11), 'systemd', 'etcd-snapshot.service',
      ['Error: context deadline exceeded',
       'Error: could not open /backup/etcd/snap.db.part (permission denied)'],
      ['apply request took too long'], [('is healthy', 'is unhealthy')])
def etcd(r):
    r('{{"level":"info","ts":"{}","msg":"created temporary db file","path":'
      '"/backup/etcd/snap.db.part"}}', r.clock('%Y-%m-%dT%H:%M:%SZ'))
    r('{{"level":"info","msg":"fetching snapshot","endpoint":'
      '"https://10.1.8.{}:2379"}}', 11)
    spent = r.took('spent', 4, .2)
    r('{{"level":"info","msg":"fetched snapshot","size":"{} MB","took":'
      '"{:.1f}s"}}', r.num('size', 210, .02, .0008), spent)
    r('Snapshot saved at /backup/etcd/{}.db', r.clock('%Y%m%d-%H%M', 0))
    r('https://10.1.8.{}:2379 is healthy: successfully committed proposal:'
      ' took = {:.3f}ms', 11, 9 + r.rng.random() * 4)


@kind((1, 0, 12), 'debian', '/usr/local/bin/site-check --all',
      ['https://shop.example.com/cart: HTTP 503 Service Unavailable',
       'https://api.example.com/: certificate has expired',
       'https://www.example.org/: timed out after 30 s'],
      ['https://www.example.org/ redirects to https://parking.example.net/'],
      [('200 OK', '302 Found')])
def sites(r):
    for name in ('www.example.org', 'shop.example.com', 'api.example.com',
                 'git.example.org', 'docs.example.org'):
        r('https://{}/ 200 OK {} bytes {:.3f} s', name,
          r.num('b' + name, 41200, .01), r.took('t' + name, .4, .3))
    r('checked {} sites', 5)


@kind(('day', 2, 0), 'wrapper', 'php -f /var/www/nextcloud/occ files:scan',
      ['Home storage for user carla not writable',
       'An unhandled exception has been thrown: Doctrine\\DBAL\\Exception:'
       ' Failed to connect to the database'],
      ['Nextcloud or one of the apps require upgrade - only a limited number'
       ' of commands are available'])
def nextcloud(r):
    users = ('anna', 'ben', 'carla', 'dora', 'emil', 'fritz')
    for number, user in enumerate(users):
        r('Starting scan for user {} out of {} ({})', number + 1, len(users),
          user)
    spent = r.took('spent', 130, .15)
    r('+---------+--------+-----+---------+---------+--------+--------------+')
    r('| Folders | Files  | New | Updated | Removed | Errors | Elapsed time |')
    r('| {:<7} | {:<6} | {:<3} | {:<7} | {:<7} | {:<6} | {:<12} |',
      r.num('folders', 9100, .01, .0008), r.num('files', 88000, .01, .0008),
      r.rng.randrange(90), r.rng.randrange(200), r.rng.randrange(60), 0,
      '0' + hms(spent))


@kind(('day', 5, 40), 'debian', 'wp --path=/var/www plugin list; wp cron run',
      ['Error: Error establishing a database connection.',
       'PHP Fatal error:  Uncaught TypeError: count(): Argument #1 in'
       ' /var/www/wp-content/plugins/seo/seo.php:771'],
      ['admin user "wpsvc" was added on 2023-11-02'],
      [('Success: WordPress install verifies against checksums.',
        'Warning: File doesn\'t verify against checksum: wp-login.php')])
def wordpress(r):
    for name, minor in (('akismet', 3), ('classic-editor', 6), ('seo', 12),
                        ('woocommerce', 5)):
        step = (r.day + len(name) * 9) // 24
        r('{:<16} active   {:<10} {}', name,
          'available' if (r.day + len(name) * 9) % 24 > 20 else 'none',
          '%d.%d.%d' % (len(name) % 7, minor, step))
    for _ in range(r.num('events', 8, .02, rows=True)):
        r('Executed the cron event \'{}\' in {:.3f}s.', r.pick(
            'wp_version_check', 'wp_update_plugins', 'wp_scheduled_delete',
            'action_scheduler_run_queue'), r.rng.random())
    r('Success: WordPress install verifies against checksums.')
    r.took('spent', 9, .3)


@kind(('day', 1, 50), 'debian', 'gitlab-backup create CRON=0',
      ['rake aborted!', 'Errno::ENOSPC: No space left on device @'
       ' io_write - /var/opt/gitlab/backups/db/database.sql.gz',
       'Backup::Error: Backup failed'],
      ['There are 3 database migrations that are down'])
def gitlab(r):
    def note(form, *values):
        r('{} -- ' + form, r.clock('%Y-%m-%d %H:%M:%S UTC'), *values)
    note('Dumping database ... ')
    note('Dumping PostgreSQL database gitlabhq_production ... [DONE]')
    r.took('base', 88, .15, .001)
    note('Dumping repositories ...')
    for number in range(r.num('repos', 18, .01, .002, rows=True)):
        note(' * group/project-{} (@hashed/{}/{}/{}) ... [DONE]', number,
             r.hexa(2), r.hexa(2), r.hexa(12))
    r.took('repositories', 240, .15, .001)
    for name in ('uploads', 'builds', 'artifacts', 'pages', 'lfs objects'):
        note('Dumping {} ... done', name)
    note('Creating backup archive: {}_gitlab_backup.tar ... done',
         int(stamp_of(r.when, 'CET')))
    note('Deleting old backups ... done. ({} removed)', 1)
    note('Backup {} is done.', r.version(16, 4, 1))


@kind((2, 0, 33), 'debian', '/home/git/bin/mirror-all',
      ['fatal: unable to access \'https://git.example.org/tools.git/\': The'
       ' requested URL returned error: 502',
       'error: cannot lock ref \'refs/heads/main\'',
       'remote: Permission to tools.git denied to mirror.'],
      [' + 1f0a9c1...77be012 main       -> main  (forced update)'])
def gitmirror(r):
    if r.chance(.5 if r.when.weekday() < 5 and 7 < r.when.hour < 20
                else .93):
        return
    for name in r.rng.sample(('tools', 'site', 'infra', 'firmware', 'docs'),
                             r.rng.randrange(1, 4)):
        r('From https://git.example.org/{}', name)
        for _ in range(r.rng.randrange(1, 3)):
            r('   {}..{}  {:<10} -> {}', r.hexa(7), r.hexa(7),
              *[r.pick('main', 'devel', 'release')] * 2)
        if r.chance(.2):
            r(' * [new branch]      {:<10} -> {}', *['topic-' + r.hexa(3)] * 2)


@kind(('work', 18, 30), 'wrapper', '/opt/erp/bin/invoice-run',
      ['ERROR: customer 41108 has no VAT id, invoice skipped',
       'Traceback (most recent call last):',
       'PRINTER invoices1 is offline, 112 documents remain in the spool'],
      ['tax table 2023 used for 41 invoices',
       'invoice numbers jump from 88102 to 88941'])
def invoices(r):
    r('Invoice run {} started by cron', r.clock('%Y-%m-%d'))
    customers = r.num('customers', 112, .12)
    if r.when.day > 26 and r.when.day < 31:
        customers *= 3
    r('customers with open items: {}', customers)
    total = 0.
    for _ in range(min(40, customers // 12)):
        amount = r.rng.lognormvariate(5, 1)
        total += amount
        r('  created RE-{}-{:05d}  {:>10.2f} EUR  net {} days', r.when.year,
          r.day * 40 + r.rng.randrange(40), amount, r.pick(14, 30))
    r('invoices created: {}', customers)
    r('mails sent: {}', int(customers * .9))
    r('sum: {:,.2f} EUR', customers * 207.5)
    r.took('spent', 75, .2)
    r('Invoice run finished, 0 problems')


@kind((1, 0, 40), 'wrapper', 'python3 /srv/etl/import_orders.py',
      ['WARNING: 118 rows rejected: column \'price\' is not numeric',
       'psycopg2.errors.UniqueViolation: duplicate key value violates unique'
       ' constraint "orders_pkey"',
       'requests.exceptions.ReadTimeout: HTTPSConnectionPool(host=\'partner.'
       'example.net\', port=443)'],
      ['falling back to the file of the previous day',
       'schema of partner feed is version 7, this program knows 6'])
def etl(r):
    hour = r.when.hour
    busy = .25 + .75 * math.exp(-((hour - 14) / 5.) ** 2)
    r('{} INFO etl: source partner.example.net, batch {}', r.clock(),
      r.hexa(12))
    rows = int(r.num('rows', 2400, .1, .001, .5) * busy)
    r('{} INFO etl: {} rows read', r.clock(), rows)
    spent = r.took('spent', 25, .2)
    r('{} INFO etl: {} rows inserted, {} updated, {} rejected', r.clock(),
      int(rows * .8), rows - int(rows * .8), 0)
    r('{} INFO etl: {:.0f} rows/s', r.clock(), rows / spent)
    r('{} INFO etl: finished', r.clock())


@kind(('work', 7, 0), 'html', 'sales-report',
      ['Query failed: ORA-01555: snapshot too old'],
      ['Figures are preliminary'],
      subject='Sales of {date}')
def sales(r):
    r('Sales report for {}', r.clock('%A, %d %B %Y', -DAY))
    for region in ('North', 'South', 'East', 'West', 'Online'):
        orders = r.num('n' + region, 84, .15)
        r('{} | {} orders | {:,.2f} EUR | {:+.1f} %', region, orders,
          orders * 61.3, r.rng.gauss(0, 6))
    r('Returns: {}', r.num('returns', 19, .25))
    r('Source: data warehouse, state of {}', r.clock('%H:%M', 0))


@kind(('work', 5, 30), 'debian', '/usr/local/sbin/ldap-sync',
      ['ldap_bind: Invalid credentials (49)',
       'ldap_sasl_bind(SIMPLE): Can\'t contact LDAP server (-1)'],
      ['more than 10 % of accounts would be removed, limit raised'])
def ldap(r):
    r('connecting to ldaps://dc{}.corp.example.com', r.rng.randrange(1, 3))
    r('found {} users in {} groups', r.num('users', 640, .004, .0003), 58)
    for user in range(r.rng.randrange(4)):
        r('modify uid={}{},ou=people,dc=example,dc=com', r.pick(
            'anna', 'ben', 'carla', 'dora'), user)
    r('added {}, changed {}, removed {}', r.rng.randrange(2),
      r.rng.randrange(5), r.rng.randrange(2))
    r.took('spent', 14, .3)
    r('sync complete')


@kind(('week2', 5, 0), 'debian', 'geoipupdate -v',
      ['error retrieving updates: unexpected HTTP status code: 401',
       'error acquiring lock: /usr/share/GeoIP/.geoipupdate.lock'],
      ['license key will be rotated by the provider'])
def geoip(r):
    r('geoipupdate version {}', r.version(4, 10, 0))
    for name in ('GeoLite2-Country', 'GeoLite2-City', 'GeoLite2-ASN'):
        r('Acquired lock file lock (/usr/share/GeoIP/.geoipupdate.lock)')
        r('Calculated MD5 sum for /usr/share/GeoIP/{}.mmdb: {}', name,
          r.hexa(32))
        r('Database {} updated: {}', name, r.hexa(32))
        r.took('t' + name, 4, .4)


@kind(('day', 4, 45), 'systemd', 'search-reindex.service',
      ['elasticsearch.exceptions.ConnectionTimeout: ConnectionTimeout caused'
       ' by - ReadTimeoutError',
       'circuit_breaking_exception: [parent] Data too large'],
      ['index docs-7 is read-only, writing to docs-6'],
      [('"status":"green"', '"status":"red"')])
def reindex(r):
    r('cluster health {{"cluster_name":"search","status":"green",'
      '"number_of_nodes":{}}}', 3)
    for name in ('docs', 'mail', 'tickets', 'wiki'):
        spent = r.took('t' + name, 66, .15, .001)
        r('indexed {} documents into {} in {:.1f}s ({:.0f}/s)',
          r.num('d' + name, 93000, .01, .001), name, spent, 93000 / spent)
    r('swapped alias to generation {}', 200 + r.day)
    r('deleted old generation {}', 198 + r.day)


@kind(('day', 22, 0), 'app', 'vzdump',
      ['ERROR: Backup of VM 104 failed - unable to open file \'/mnt/pve/nas/'
       'dump\' - Input/output error',
       'ERROR: VM 101 is locked (snapshot)'],
      ['INFO: guest-agent of VM 102 is not running, no filesystem freeze'],
      subject='vzdump backup status ({host}) : backup successful')
def vzdump(r):
    r('VMID    NAME      STATUS  TIME       SIZE      FILENAME')
    names = ('web', 'mail', 'db', 'git')
    for number, name in enumerate(names):
        spent = r.took('t' + name, 310, .1, .0006)
        r('{:<7} {:<9} ok      {}    {:.2f}GB    /mnt/pve/nas/dump/vzdump-'
          'qemu-{}-{}.vma.zst', 101 + number, name, hms(spent),
          r.num('s' + name, 14, .01, .001, whole=False), 101 + number,
          r.clock('%Y_%m_%d-%H_%M_%S'))
    r('TOTAL                     {}', hms(r.seconds))
    r('Detailed backup logs:')
    for number, name in enumerate(names):
        r('{}: {} INFO: Starting Backup of VM {} (qemu)', 101 + number,
          r.clock('%F %T'), 101 + number)
        r('{}: {} INFO: status = running', 101 + number, r.clock('%F %T'))
        r('{}: {} INFO: transferred {:.2f} GiB in {} seconds ({:.1f} MiB/s)',
          101 + number, r.clock('%F %T'), 31 + r.rng.random(),
          r.rng.randrange(250, 340), 90 + r.rng.random() * 20)
        r('{}: {} INFO: Finished Backup of VM {}', 101 + number,
          r.clock('%F %T'), 101 + number)


@kind(('day', 0, 50), 'debian', '/usr/lib/cgi-bin/awstats.pl -update',
      ['Error: AWStats database directory defined in config file by "DirData"'
       ' parameter does not exist or is not writable.',
       'Error: Couldn\'t open server log file "/var/log/nginx/access.log"'],
      ['Warning: the log has records older than the last update'])
def awstats(r):
    r('Create/Update database for config "/etc/awstats/awstats.conf" by'
      ' AWStats version {}', r.version(7, 8))
    r('From data in log file "/var/log/nginx/access.log.1"...')
    r('Phase 1 : First bypass old records, searching new record...')
    r('Direct access after last parsed record (after line {})',
      r.rng.randrange(9000))
    lines = r.num('lines', 88100, .12, .001, .6)
    r.took('spent', 60, .15)
    r('Parsed lines in file: {}', lines)
    r(' Found {} dropped records,', int(lines * .021))
    r(' Found {} comments,', 0)
    r(' Found {} corrupted records,', 0)
    r(' Found {} old records,', 1)
    r(' Found {} new qualified records.', int(lines * .97))


@kind(('week3', 10, 0), 'debian', '/usr/local/bin/ups-test',
      ['Error: Unable to connect to UPS',
       'Battery replacement needed'],
      ['input voltage 187.2 V, running on AVR'],
      [('SELFTEST : OK', 'SELFTEST : NG'), ('STATUS   : ONLINE',
                                            'STATUS   : ONBATT')])
def ups(r):
    r('STATUS   : ONLINE')
    r('LINEV    : {:.1f} Volts', r.num('volts', 231, .006, whole=False))
    r('LOADPCT  : {:.1f} Percent', r.num('load', 24, .06, whole=False))
    r('BCHARGE  : 100.0 Percent')
    r('TIMELEFT : {:.1f} Minutes', r.num('left', 41, .04, -.0004,
                                         whole=False))
    r('SELFTEST : OK')
    r('BATTDATE : 2023-02-11')


@kind((3, 0, 2), 'debian', 'sensors -A | mail-if-changed',
      ['Error: can\'t read temp1: No such device',
       'ERROR: Can\'t get value of subfeature fan2_input: I/O error'],
      ['Core 3:       (throttled)'])
def sensors(r):
    r('coretemp-isa-0000')
    warm = r.num('warm', 44, .05, 0, .95, whole=False)
    r('Package id 0:  +{:.1f}°C  (high = +80.0°C, crit = +100.0°C)', warm)
    for core in range(4):
        r('Core {}:        +{:.1f}°C  (high = +80.0°C, crit = +100.0°C)',
          core, warm - r.rng.random() * 4)
    r('fan1:        {} RPM  (min =  600 RPM)', r.num('fan', 1240, .03))
    r('in0:          +{:.2f} V', r.num('volt', 1.02, .004, whole=False))


@kind(('day', 6, 5), 'app', 'dnf-automatic',
      ['Error: Failed to download metadata for repo \'baseos\': Cannot'
       ' download repomd.xml: All mirrors were tried',
       'Error: Transaction test error: file /usr/lib64/libssl.so conflicts'],
      ['Skipping packages with broken dependencies: kernel-core'],
      subject='Updates available on \'{host}\'.')
def dnf(r):
    if r.chance(.55):
        return
    r('The following updates are available on \'{}\':', r.host)
    r('=' * 76)
    r(' Package             Arch     Version             Repository   Size')
    count = r.rng.randrange(1, 12)
    for package in r.rng.sample(PACKAGES, count):
        r(' {:<19} {:<8} {:<19} {:<10} {:>5} k', package, 'x86_64',
          '%d.%d-%d.el9' % tuple(r.rng.randrange(1, 40) for _ in 'abc'),
          r.pick('baseos', 'appstream', 'epel'), r.rng.randrange(20, 900))
    r('Transaction Summary')
    r('Upgrade  {} Packages', count)


@kind(('day', 3, 50), 'wrapper', 'aws s3 sync /srv/media s3://media-mirror',
      ['upload failed: video/a.mp4 to s3://media-mirror/a.mp4 An error'
       ' occurred (AccessDenied) when calling the PutObject operation',
       'fatal error: Unable to locate credentials'],
      ['warning: Skipping file /srv/media/tmp/x. File does not exist.'])
def s3sync(r):
    for number in range(r.num('uploads', 22, .3, rows=True)):
        r('upload: ../srv/media/{}/{}.jpg to s3://media-mirror/{}/{}.jpg',
          r.clock('%Y/%m', 0), r.hexa(8), r.clock('%Y/%m', 0), r.hexa(8))
    r.took('spent', 80, .25)
    r('Completed, {} objects in bucket, {}', r.num('objects', 120000, .002,
                                                   .001),
      size(r.num('bucket', 6.6e11, .002, .001)))


@kind(('day', 21, 5), 'app', 'bacula',
      ['{0}-sd JobId 4411: Fatal error: Device reservation failed',
       '{0}-dir JobId 4411: Error: Bacula Director: Network error with FD'],
      ['  Last Volume Bytes:      0 (0 B)', '  Tape needs cleaning'],
      [('Termination:            Backup OK',
        'Termination:            Backup OK -- with warnings'),
       ('SD termination status:  OK', 'SD termination status:  Canceled')],
      subject='Bacula: Backup OK of {host}-fd Incremental')
def bacula(r):
    number = 4000 + r.day * 3
    stamp = r.clock('%d-%b %H:%M')
    r('{} {}-dir JobId {}: Start Backup JobId {}, Job={}.{}', stamp, r.host,
      number, number, r.host, r.clock('%Y-%m-%d_%H.%M.%S_07'))
    r('{} {}-dir JobId {}: Using Device "LTO-{}" to write.', stamp, r.host,
      number, r.rng.randrange(1, 3))
    spent = r.took('spent', 700, .15)
    r('  Build OS:               x86_64-pc-linux-gnu debian 12')
    r('  JobId:                  {}', number)
    r('  Backup Level:           {}', 'Full' if r.when.weekday() == 5
      else 'Incremental')
    r('  Volume name(s):         TAPE-{:04d}', 100 + r.day // 6)
    r('  Elapsed time:           {} mins {} secs', int(spent // 60),
      int(spent % 60))
    weekly = 14 if r.when.weekday() == 5 else 1
    r('  FD Files Written:       {:,}', r.num('files', 4100, .2) * weekly)
    r('  FD Bytes Written:       {:,} ({})',
      *(lambda n: (n, size(n)))(r.num('bytes', 2.9e9, .25) * weekly))
    r('  Rate:                   {:.1f} KB/s', r.num('rate', 41000, .1,
                                                     whole=False))
    r('  Encryption:             yes')
    r('  Non-fatal FD errors:    0')
    r('  SD termination status:  OK')
    r('  Termination:            Backup OK')


@kind(('month2', 6, 0), 'debian', '/usr/local/bin/monthly-accounting',
      ['sa: no accounting data in /var/account/pacct',
       'ERROR: quota file for 3 tenants is missing'],
      ['rates of the year before were applied'])
def accounting(r):
    r('Accounting for {}', r.clock('%B %Y', -5 * DAY))
    for tenant in range(r.num('tenants', 17, .005, rows=True)):
        r('tenant-{:02d}  cpu {:>9.1f} h  disk {:>8.2f} GB  net {:>9.2f} GB',
          tenant, r.num('cpu%d' % tenant, 811, .1, whole=False),
          r.num('disk%d' % tenant, 310, .05, .001, whole=False),
          r.num('net%d' % tenant, 94, .2, whole=False))
    r('total {} tenants, written to /srv/acct/{}.csv', 17,
      r.clock('%Y-%m', -5 * DAY))


@kind(('day', 12, 0), 'debian', '/usr/local/bin/weather-archive',
      ['station 3 does not answer', 'curl: (28) Operation timed out after'
       ' 30001 milliseconds with 0 bytes received'],
      ['station 2 reports 1970-01-01'])
def weather(r):
    season = math.sin((r.day - 100) / 365. * 2 * math.pi)
    for station in range(1, 5):
        r('station {}: {:.1f} C, {:.0f} %, {:.1f} hPa, {} records', station,
          10 + 9 * season + r.rng.gauss(0, 3), 70 + r.rng.gauss(0, 9),
          1013 + r.rng.gauss(0, 8), r.num('records', 1440, .003))
    r('archive: {} files, {}', 900 + 4 * r.day,
      size(r.num('archive', 3.2e8, .001, .002)))


##############################################################################
# Jobs: one kind on one host, through the months
#
# Owns what is the job's own: its sizes, its schedule, when it is upgraded,
# and what its lines have been so far, which is what a fault needs to know to
# be one.
##############################################################################

def shape(text):
    """A line without what varies in nearly any line: our own rough idea of
    sameness, used for faults and never for judging."""
    return re.sub(r'[0-9a-f]{7,}|\d+', '#', text)


class Job:
    """One kind of program on one host, with its own sizes and history."""

    def __init__(self, seed, number, made, days):
        rng = self.rng = random.Random('%s job %d' % (seed, number))
        self.seed, self.number, self.kind = seed, number, made
        self.host = '%s%d' % (rng.choice(('web', 'db', 'app', 'mx', 'nas',
                                          'vm', 'ci')), number // 8 + 1)
        self.domain = rng.choice(('example.org', 'corp.example.com',
                                  'example.net'))
        self.root = 'root@%s.%s' % (self.host, self.domain)
        self.zone = rng.choice(('CET', 'CET', 'UTC'))
        self.encoding = rng.choice(('7bit', '8bit', '8bit',
                                    'quoted-printable', 'base64'))
        every, hour, minute = made.schedule
        self.schedule = every, hour, (minute + rng.randrange(9)) % 60
        self.scales = {}
        self.seen = {}      # number's name -> [spread, rows, long, share, n]
        self.shapes = {}    # shape -> runs of the present text that had it
        self.runs = 0
        self.last = None    # text of the last sound run
        quarter = max(1, days // 90)
        self.changes = sorted(rng.randrange(20, max(21, days)) for _ in
                              range(quarter) if rng.random() < .3)
        # Once in a while a program's output changes as a whole.
        self.rewrite = rng.choice(self.changes) if (
            self.changes and rng.random() < .15) else None

    def scale(self, name):
        """How large this job is, of its kind; the same for good."""
        if name not in self.scales:
            self.scales[name] = math.exp(random.Random('%s %d %s' % (
                self.seed, self.number, name)).gauss(0, .25))
        return self.scales[name]

    def learn(self, name, spread, rows, long, value, share=False):
        entry = self.seen.setdefault(name, [spread, rows, long, share, 0, 0.])
        entry[4] += 1
        entry[5] += (value - entry[5]) / min(entry[4], 20)

    def upgrades(self, day):
        return sum(1 for change in self.changes if change <= day)

    def write(self, when, change=None):
        """The Run that starts at local time `when`, with its lines."""
        run = Run(self, when, random.Random('%s %d %s' % (
            self.seed, self.number, when)), change)
        self.kind.writer(run)
        for number in range(self.upgrades(run.day)):
            run.lines = self.upgraded(number, run.lines)
        if self.rewrite is not None and run.day >= self.rewrite:
            run.lines = [('[info] ' + form, '[info] ' + text)
                         for form, text in run.lines]
        return run

    def upgraded(self, number, lines):
        """The lines as a new version writes them: one reworded, one new."""
        rng = random.Random('%s %d upgrade %d' % (self.seed, self.number,
                                                  number))
        plain = sorted({form for form, _ in lines if '{' not in form
                        and len(form) > 12 and form not in
                        {state[0] for state in self.kind.states}})
        out = list(lines)
        if plain:
            old = plain[rng.randrange(len(plain))]
            out = [(form, text) if form != old else
                   (form + ' [v%d]' % (number + 2), text.rstrip('.')
                    + rng.choice((' as configured', ' (default)', ' now')))
                   for form, text in out]
        if out and rng.random() < .5:
            form = rng.choice(('using configuration of version 2',
                               'notice: option "compat" is no longer needed',
                               'support for the old syntax ends in 2027'))
            out.insert(min(len(out), 1 + rng.randrange(2)), (form, form))
        return out

    def remember(self, run):
        """Keep what a later fault must know of a sound run."""
        self.runs += 1
        for each in {shape(text) for _, text in run.lines}:
            self.shapes[each] = self.shapes.get(each, 0) + 1
        if run.lines:
            self.last = run

    def constant(self, run):
        """Positions of lines that every run so far had just once."""
        shapes = [shape(text) for _, text in run.lines]
        return [i for i, each in enumerate(shapes) if shapes.count(each) == 1
                and self.shapes.get(each, 0) >= self.runs - 1 > 4
                and len(each.strip()) > 5]


##############################################################################
# Senders: lines to raw mails
##############################################################################

def encoded(job, text, subtype='plain'):
    """Header lines of the content and the body, as bytes."""
    data = text.encode('utf-8')
    how = job.encoding
    if how == '7bit' and max(data, default=0) > 126:
        how = '8bit'
    if how == 'base64':
        data = base64.encodebytes(data)
    elif how == 'quoted-printable':
        import quopri
        data = quopri.encodestring(data)
    return ['MIME-Version: 1.0',
            'Content-Type: text/%s; charset=UTF-8' % subtype,
            'Content-Transfer-Encoding: ' + how], data


def mail_date(stamp, zone):
    moment, ahead = local(stamp, zone), offset(stamp, zone) // 3600
    return '%s, %d %s %d %s +%02d00' % (
        WEEKDAYS[moment.weekday()], moment.day, MONTHS[moment.month - 1],
        moment.year, moment.strftime('%H:%M:%S'), ahead)


def addressed(sender, to, subject):
    return ['From: ' + sender, 'To: ' + to, 'Subject: ' + subject]


def by_debian(job, run, texts, subject, rng):
    root = job.root
    return addressed('root (Cron Daemon) <%s>' % root, root,
                     'Cron <root@%s> %s' % (job.host, job.kind.command)), [
        'MIME-Version: 1.0', 'Content-Type: text/plain; charset=UTF-8',
        'Content-Transfer-Encoding: 8bit', 'X-Cron-Env: <SHELL=/bin/sh>',
        'X-Cron-Env: <HOME=/root>', 'X-Cron-Env: <PATH=/usr/bin:/bin>',
        'X-Cron-Env: <LOGNAME=root>', 'Auto-Submitted: auto-generated'
    ], joined(texts).encode('utf-8')


def by_freebsd(job, run, texts, subject, rng):
    return addressed('Cron Daemon <%s>' % job.root, job.root,
                     'Cron <root@%s> %s' % (job.host, job.kind.command)), [
        'X-Cron-Env: <SHELL=/bin/sh>', 'X-Cron-Env: <USER=root>'
    ], joined(texts).encode('utf-8')


def by_anacron(job, run, texts, subject, rng):
    text = '/etc/cron.daily/%s:\n' % job.kind.command + joined(texts)
    return addressed('Anacron <%s>' % job.root, job.root,
                     "Anacron job 'cron.daily' on " + job.root[5:]), [
        'Content-Type: text/plain; charset="UTF-8"'], text.encode('utf-8')


def by_systemd(job, run, texts, subject, rng):
    unit = job.kind.command
    tag = '%s %s[%d]: ' % (job.host, unit.split('.')[0],
                           rng.randrange(700, 99999))
    ending = ('Deactivated successfully.' if not run.exit else
              "Failed with result 'exit-code'.")
    clock = (run.when.strftime('%b %d %H:%M:%S ')).replace(' 0', '  ', 1)
    texts = (['%s - nightly task' % unit,
              '     Loaded: loaded (/etc/systemd/system/%s; static)' % unit,
              '   Main PID: %d (code=exited, status=%d/%s)' % (
                  rng.randrange(700, 99999), run.exit,
                  'FAILURE' if run.exit else 'SUCCESS'), '']
             + [clock + tag + text for text in texts]
             + [clock + job.host + ' systemd[1]: %s: %s' % (unit, ending)])
    return (addressed('systemd <%s>' % job.root, job.root,
                      '[%s] %s' % (job.host, unit)),
            *encoded(job, joined(texts)))


def by_wrapper(job, run, texts, subject, rng):
    name = job.kind.command.split('/')[-1]
    return (addressed('%s <%s>' % (name, job.root), 'ops@' + job.domain,
                      '%s: %s' % (job.host, name)),
            *encoded(job, joined(texts) + '-- \nexit status %d after %.1f s\n'
                     % (run.exit, run.seconds)))


def by_html(job, run, texts, subject, rng):
    rows = ''.join('<tr><td>%s</td></tr>\n' % text.replace(
        '&', '&amp;').replace('<', '&lt;').replace('|', '</td><td>')
        for text in texts)
    page = '<html><body><table>\n%s</table></body></html>\n' % rows
    edge = '=_%016x' % rng.getrandbits(64)
    lines, part = encoded(job, page, 'html')
    return addressed('Reports <reports@%s>' % job.domain,
                     'sales@' + job.domain, subject), [
        'MIME-Version: 1.0',
        'Content-Type: multipart/mixed;\n boundary="%s"' % edge
    ], ('This is a multi-part message in MIME format.\n--%s\n%s\n\n' % (
        edge, '\n'.join(lines))).encode() + part + (
            '\n--%s--\n' % edge).encode()


def by_app(job, run, texts, subject, rng):
    return (addressed('root <%s>' % job.root, job.root, subject),
            *encoded(job, joined(texts)))


# Each gives the header of the envelope, that of the content, and the body.
SENDERS = {'debian': by_debian, 'freebsd': by_freebsd, 'anacron': by_anacron,
           'systemd': by_systemd, 'wrapper': by_wrapper, 'html': by_html,
           'app': by_app}


def joined(texts):
    return '\n'.join(texts) + '\n'


def mail_raw(job, run, texts, stamp, rng):
    """The raw mail of a run's lines, as the job's sender sends it."""
    moment = local(stamp, job.zone)
    head = ['Return-Path: <%s>' % job.root,
            'Received: by mail.%s (Postfix, from userid 0)\n\tid %s; %s' % (
                job.domain, '%010X' % rng.getrandbits(40),
                mail_date(stamp, job.zone))]
    subject = (job.kind.subject or '').format(
        host=job.host, date=moment.strftime('%d %B %Y'),
        state=rng.choice(('package on hold', 'reboot'))
        if job.kind.sender == 'app' and rng.random() < .2 else 'ok')
    if run.exit:
        for good, bad in (('SUCCESS', 'FAILURE'), ('Backup OK', 'Backup'
                          ' Error'), ('backup successful', 'backup failed')):
            subject = subject.replace(good, bad)
    envelope, content, data = SENDERS[job.kind.sender](job, run, texts,
                                                       subject, rng)
    head += envelope + content + ['Message-Id: <%s.%x@%s>' % (
        moment.strftime('%Y%m%d%H%M%S'), rng.getrandbits(40), job.root[5:]),
        'Date: ' + mail_date(stamp, job.zone)]
    return '\n'.join(head).encode('utf-8') + b'\n\n' + data


##############################################################################
# Faults
#
# A class is a function of job, run and rng that changes the run, or returns
# False where the job has no such thing.  Those of time (missing, late,
# off-time, storm) are done by corpus().
##############################################################################

NUMERIC = {'value high', 'value low', 'value zero', 'count low',
           'count high', 'slow', 'ramp'}


def numbers_of(job, want):
    """Names of numbers that a fault of class `want` can be put upon."""
    names = []
    for name, (spread, rows, long, share, seen, mean) in job.seen.items():
        if seen < job.runs * .8:
            continue
        fit = {'value high': not rows and not long and spread <= .3,
               'value low': not rows and not long and not share
               and spread <= .2 and mean > 30,
               'value zero': not rows and not long and not share
               and spread <= .3 and mean > 20,
               'count low': rows and mean >= 5 and spread <= .3,
               'count high': rows and mean >= 2 and spread <= .3,
               'slow': long and mean > 5,
               'ramp': not rows and not long and spread <= .05}[want]
        if fit and not (share and mean > 75):
            names.append(name)
    return sorted(names)


def numeric_change(job, rng, want, step=0):
    """{name: function} for a Run, or None."""
    names = numbers_of(job, want)
    if not names:
        return None
    name = names[rng.randrange(len(names))]
    spread, share = job.seen[name][0], job.seen[name][3]
    if share:
        way = {'ramp': lambda v: v + 4 * (step + 1)}.get(
            want, lambda v: 97 + rng.randrange(4))
    else:
        much = math.exp(4 * spread) * rng.uniform(2.5, 12)
        way = {'value high': lambda v: v * much,
               'value low': lambda v: v / much,
               'value zero': lambda v: 0,
               'count low': lambda v: v * rng.choice((0, .2, .3)),
               'count high': lambda v: v * rng.uniform(4, 12) + 5,
               'slow': lambda v: v * rng.uniform(6, 15),
               'ramp': lambda v: v * 1.18 ** (step + 1)}[want]
    return {name: way}


def told(job, rng, lines):
    line = lines[rng.randrange(len(lines))]
    return line.replace('{0}', job.host)


def error_line(job, run, rng):
    line = told(job, rng, job.kind.errors)
    run.lines.insert(rng.randrange(len(run.lines) + 1), ('error', line))
    run.exit = rng.choice((0, 0, 1))


def odd_line(job, run, rng):
    line = told(job, rng, job.kind.odd)
    run.lines.insert(rng.randrange(len(run.lines) + 1), ('odd', line))


def lost_line(job, run, rng):
    fit = job.constant(run)
    if len(fit) < 2:
        return False
    del run.lines[fit[rng.randrange(len(fit))]]


def empty(job, run, rng):
    if job.kind.sender not in ('app', 'wrapper', 'systemd', 'html'):
        return False            # cron does not mail what is empty
    run.lines = []


def flood(job, run, rng):
    line = told(job, rng, job.kind.errors + job.kind.odd)
    count = 15 * len(run.lines) + 150 + rng.randrange(200)
    at = rng.randrange(len(run.lines) + 1)
    run.lines[at:at] = [('flood', '%s (%d)' % (line, rng.randrange(9999)))
                        for _ in range(count)]


def cut(job, run, rng):
    fit = job.constant(run)
    if len(run.lines) < 5 or not fit or fit[-1] < len(run.lines) // 2:
        return False
    run.lines = run.lines[:max(2, int(len(run.lines)
                                      * rng.uniform(.2, .5)))]
    form, text = run.lines[-1]
    run.lines[-1] = form, text[:max(1, len(text) // 2)]
    run.exit = rng.choice((0, 137))


def order(job, run, rng):
    fit = job.constant(run)
    if len(fit) < 4:
        return False
    moved = [run.lines.pop(i) for i in reversed(fit[len(fit) // 2:])]
    at = fit[0]
    run.lines[at:at] = reversed(moved)


def broken(job, run, rng):
    command = job.kind.command.split()[0].strip('"')
    texts = rng.choice((
        ['/bin/sh: 1: %s: not found' % command],
        ['Traceback (most recent call last):',
         '  File "%s", line %d, in <module>' % (command,
                                                rng.randrange(9, 400)),
         '    main()', 'OSError: [Errno 5] Input/output error'],
        ['%s: line %d: syntax error near unexpected token `fi\'' % (
            command, rng.randrange(9, 90))],
        ['Segmentation fault (core dumped)'],
        ['Can\'t locate Config/Tiny.pm in @INC (you may need to install the'
         ' Config::Tiny module)', 'BEGIN failed--compilation aborted at %s'
         ' line %d.' % (command, rng.randrange(9, 90))],
        ['error while loading shared libraries: libssl.so.1.1: cannot open'
         ' shared object file: No such file or directory']))
    run.lines = [('broken', text) for text in texts]
    run.exit = rng.choice((1, 127, 139))


def state(job, run, rng):
    fit = [(i, old, new) for i, (_, text) in enumerate(run.lines)
           for old, new in job.kind.states if old in text]
    if not fit:
        return False
    i, old, new = fit[rng.randrange(len(fit))]
    form, text = run.lines[i]
    run.lines[i] = form, text.replace(old, new)


def stale(job, run, rng):
    """The text of the last run once more: what was looked at is not new."""
    if job.last is None:
        return False
    last = {text for _, text in job.last.lines}
    moved = [text for _, text in run.lines if text not in last]
    if len(moved) < max(2, len(run.lines) / 4) or not any(
            re.search(r'\d:\d\d|20\d\d', text) for text in moved):
        return False            # it is much the same each time
    run.lines = list(job.last.lines)


def garbled(job, run, rng):
    if len(run.lines) < 3:
        return False
    sure = rng.randrange(len(run.lines))
    for i in range(len(run.lines)):
        if rng.random() < .4 or i == sure:
            form, text = run.lines[i]
            run.lines[i] = form, ''.join(
                chr(rng.choice((0xfffd, 0x251c, 0xc3, 0x1b, 0x7f, 0x2592)))
                if rng.random() < .5 else c for c in text or '###')


def exit_only(job, run, rng):
    if job.kind.sender not in ('wrapper', 'systemd'):
        return False
    run.exit = rng.choice((1, 2, 24, 75))


TEXTUAL = {'error line': error_line, 'odd line': odd_line,
           'lost line': lost_line, 'empty': empty, 'flood': flood,
           'cut': cut, 'order': order, 'broken': broken, 'state': state,
           'stale': stale, 'garbled': garbled, 'exit only': exit_only}
TIMES = {'missing', 'late', 'off time', 'storm'}
CLASSES = sorted(TEXTUAL) + sorted(NUMERIC) + sorted(TIMES)
LENGTHS = {'ramp': 9, 'stale': 4}       # runs that show it; others 1 to 3


class Fault:
    """One injected fault: job, class, and from when to when it shows."""

    __slots__ = ('number', 'job', 'kind', 'start', 'end', 'runs')

    def __init__(self, number, job, kind):
        self.number, self.job, self.kind = number, job, kind
        self.start = self.end = None    # POSIX times; end: last chance
        self.runs = 0                   # mails that showed it


##############################################################################
# Corpus
##############################################################################

class Mail:
    """One mail that arrived, and the truth of it."""

    __slots__ = ('time', 'job', 'raw', 'texts', 'labels', 'exit', 'fault')

    def __init__(self, time, job, raw, texts, labels, exit, fault):
        self.time = time        # POSIX seconds of its arrival
        self.job = job          # number of the job
        self.raw = raw          # bytes
        self.texts = texts      # lines before the sender dressed them
        self.labels = labels    # format of each line
        self.exit = exit        # true exit status
        self.fault = fault      # Fault or None


class Corpus:
    """Mails in order of arrival, faults in order of start, the jobs."""

    def __init__(self, mails, faults, jobs, days, learning):
        self.mails, self.faults, self.jobs = mails, faults, jobs
        self.days, self.learning = days, learning   # learning: in days


class Story:
    """The months of one job: its runs, the faults put upon them, its mails.

    A fault begins about once in a month: none within the learning
    time, none in the first runs of a job that runs seldom, none in the week
    after an upgrade.
    """

    def __init__(self, job, days, learning, first, used):
        self.job = job
        self.used = used        # class -> faults so far, of all jobs
        self.rng = random.Random('%s %d story' % (job.seed, job.number))
        self.starts = list(moments(job.schedule, days))
        self.begin = max(first, sum(1 for when in self.starts
                                 if (when - EPOCH).days < learning))
        self.daily = len(self.starts) / days
        self.faults = []        # that began
        self.active = None      # that shows now
        self.left = 0           # runs for which it still does
        self.dice = 0           # seed of what it changes, the same each run
        self.rest = 0           # runs without a new one
        self.due = None         # that ends when the next mail comes

    def due_now(self, i, when):
        """Whether a fault begins with run i."""
        self.rest -= 1
        return (self.rest <= 0 and self.begin <= i < len(self.starts) - 12
                and not any(0 <= (when - EPOCH).days - change < 7
                            for change in self.job.changes)
                and self.rng.random() < 1 / 14. / self.daily)

    def attempt(self, kind, when, step):
        """The Run of that moment with a fault of class `kind`, or None."""
        job, rng = self.job, random.Random('%s %s' % (self.dice, step))
        if kind in NUMERIC:
            change = numeric_change(job, random.Random(self.dice), kind, step)
            if change is None:
                return None
            run = job.write(when, change)
            return run if self.visible(run, when) else None
        run = job.write(when)
        if kind in TIMES:
            return run if run.lines and job.kind.name not in SELDOM and (
                kind in ('missing', 'storm')
                or job.schedule[0] in ('day', 'work')) else None
        if not run.lines or TEXTUAL[kind](job, run, rng) is False:
            return None
        return run

    def visible(self, run, when):
        """Whether a changed number shows, by more than the time of day."""
        def told(run):
            return [re.sub(r'\b\d\d:\d\d(:\d\d)?\b', '', text)
                    for _, text in run.lines]
        plain = self.job.write(when)
        return told(run) != told(plain) or (
            self.job.kind.sender == 'wrapper'
            and run.seconds > 2 * plain.seconds)

    def start(self, when):
        """Begin a fault, of a class that was rare so far and can be."""
        self.dice = self.rng.random()
        for kind in sorted(CLASSES, key=lambda kind: self.used.get(kind, 0)
                           + self.rng.random() * 3):
            run = self.attempt(kind, when, 0)
            if run is not None:
                self.active = Fault(len(self.faults), self.job, kind)
                self.faults.append(self.active)
                self.used[kind] = self.used.get(kind, 0) + 1
                self.left = 1 if kind == 'storm' else (
                    LENGTHS.get(kind) or self.rng.choice((1, 1, 1, 2, 3)))
                self.rest = self.left + int(9 * self.daily) + 6
                return run
        return None

    def run(self, i, when):
        """(Run of that moment, Fault that it shows or None)."""
        run = None
        if self.active:
            run = self.attempt(self.active.kind, when, self.active.runs)
            if run is None:
                self.active = None
        elif self.due_now(i, when):
            run = self.start(when)
        if run is None:
            return self.job.write(when), None
        return run, self.active

    def arrivals(self, fault, at):
        """When the mails of a run come that is over at `at`."""
        kind = fault.kind if fault else None
        if kind == 'missing':
            return []
        if kind == 'late':
            return [at + self.rng.uniform(5, 9) * 3600]
        if kind == 'off time':
            return [at, at + self.rng.uniform(6, 16) * 3600]
        if kind == 'storm':
            return [at + 240 * n for n in range(30)]
        return [at]

    def end(self, fault, at):
        """Note that `fault` showed until `at`, and whether it goes on."""
        fault.runs += 1
        fault.end = at + 3600
        self.left -= 1
        if self.left <= 0:
            self.active = None
            if fault.kind == 'missing':
                self.due = fault

    def mails(self):
        """Yield the Mails in order of their runs."""
        job = self.job
        for i, when in enumerate(self.starts):
            run, fault = self.run(i, when)
            if not run.lines and not fault:
                continue                # cron sends nothing
            at = (stamp_of(when, job.zone) + run.seconds
                  + self.rng.random() * 20)
            if job.kind.sender == 'anacron':
                at += self.rng.random() * 2400
            if self.due:                # the next mail: the last chance
                self.due.end, self.due = at + 3600, None
            if fault and fault.start is None:
                fault.start = at - run.seconds - 60
            times = self.arrivals(fault, at)
            texts = [text for _, text in run.lines]
            labels = [form for form, _ in run.lines]
            for time in times:
                yield Mail(time, job.number, mail_raw(
                    job, run, texts, time, self.rng), texts, labels,
                    run.exit, fault)
            if fault:
                self.end(fault, max(times + [at]))
            else:
                job.remember(run)


SELDOM = {'apticron', 'gitmirror', 'dnf'}       # mail only if there is news


def corpus(seed, jobs=56, days=180, learning=45, first=12, kinds=None):
    """Make `jobs` jobs, one of each kind in turn, and their mails.

    The same arguments give the same bytes.  No fault starts in the first
    `learning` days, nor in the `first` runs of a job.
    """
    names = sorted(kinds or KINDS)
    random.Random('%s kinds' % seed).shuffle(names)
    made = [Job(seed, number, KINDS[names[number % len(names)]], days)
            for number in range(jobs)]
    faults, mails, used = [], [], {}
    for job in made:
        story = Story(job, days, learning, first, used)
        mails += story.mails()
        faults += story.faults
    mails.sort(key=lambda mail: (mail.time, mail.job))
    end = stamp_of(EPOCH, 'UTC') + days * DAY - 3 * 3600    # in all zones
    mails = [mail for mail in mails if mail.time < end]
    faults.sort(key=lambda fault: (fault.start, fault.job.number))
    for number, fault in enumerate(faults):
        fault.number = number
    return Corpus(mails, faults, made, days, learning)


def main():
    parser = argparse.ArgumentParser(description='Write an mbox of cron'
                                     ' mails, some of them with faults.')
    parser.add_argument('--seed', default='1')
    parser.add_argument('--jobs', type=int, default=len(KINDS))
    parser.add_argument('--days', type=int, default=90)
    parser.add_argument('--learning', type=int, default=45)
    parser.add_argument('--truth', metavar='FILE',
                        help='write the faults there, one a line')
    args = parser.parse_args()
    made = corpus(args.seed, args.jobs, args.days, args.learning)
    out = sys.stdout.buffer
    for mail in made.mails:
        stamp = local(mail.time, 'UTC').strftime('%a %b %e %H:%M:%S %Y')
        out.write(b'From root@localhost %s\n' % stamp.encode())
        out.write(re.sub(br'(?m)^(>*From )', br'>\1', mail.raw) + b'\n')
    if args.truth:
        with open(args.truth, 'w') as file:
            for fault in made.faults:
                file.write('%s\t%s\t%d\t%d\n' % (
                    fault.job.host + ' ' + fault.job.kind.command,
                    fault.kind, fault.start, fault.end))


if __name__ == '__main__':
    main()
