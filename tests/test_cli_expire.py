# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--expire: which archives rules keep, and that only the others go.

The rules are compared with a reference that knows nothing but the manual:
for each rule it looks at every period there is.  What touches the store is
tried with hosts and clocks of a lab.
"""

import calendar
import contextlib
import datetime
import json
import os
import random
import time
import unittest
from unittest import mock

import lab
import tarsnap

SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(10 ** 6)))
RUNS = 250
DAY = 86400
EPOCH = datetime.datetime(1970, 1, 1)
NOW = calendar.timegm((2026, 11, 20, 12, 0, 0))     # a Friday
RULES = ('last', 'hourly', 'daily', 'weekly', 'monthly', 'yearly')


def setUpModule():
    print('SEED=%d' % SEED)


@contextlib.contextmanager
def zone(name):
    try:
        with mock.patch.dict(os.environ, {'TZ': name}):
            time.tzset()
            yield
    finally:
        time.tzset()


##############################################################################
# The rules
##############################################################################


def start_of(rule, when):
    """The beginning of the period of `rule` that the datetime `when` is in."""
    day = when.replace(hour=0, minute=0, second=0, microsecond=0)
    if rule == 'hourly':
        return when.replace(minute=0, second=0, microsecond=0)
    if rule == 'weekly':
        return day - datetime.timedelta(days=when.weekday())
    if rule == 'monthly':
        return day.replace(day=1)
    return day.replace(day=1, month=1) if rule == 'yearly' else day


def reference(archives, rules, within):
    """Titles kept.  `archives`: [(series, time, created, title)]."""
    kept = set()
    for series in {row[0] for row in archives}:
        rows = sorted(row[1:] for row in archives if row[0] == series)
        kept.add(rows[-1][2])
        for rule, count in rules.items():
            if rule == 'last':
                kept |= {row[2] for row in rows[max(0, len(rows) - count):]}
                continue
            periods = {}
            for row in rows:                # the last of each stays
                when = EPOCH + datetime.timedelta(seconds=row[0])
                periods[start_of(rule, when)] = row[2]
            for start in sorted(periods, reverse=True)[:count]:
                kept.add(periods[start])
        if within is not None:
            kept |= {row[2] for row in rows if row[0] >= rows[-1][0] - within}
    return kept


def dated(series, when, created, title):
    return tarsnap.Dated(title, title, title, series, created, when)


def judge(rows, rules, within):
    """Titles the program keeps."""
    archives = [dated(*row) for row in rows]
    tarsnap.retention(archives, rules, within is not None and
                      ('%ds' % within, within) or None)
    return {archive.title for archive in archives if archive.kept}


class Rules(unittest.TestCase):

    def setUp(self):
        stack = zone('UTC')
        stack.__enter__()
        self.addCleanup(stack.__exit__, None, None, None)

    def case(self, dice):
        """Random archives and rules."""
        reach = dice.choice((2 * DAY, 40 * DAY, 3 * 365 * DAY))
        grain = dice.choice((1, 600, 3600, DAY))
        rows = []
        for number in range(dice.randrange(1, 60)):
            when = NOW - dice.randrange(reach) // grain * grain
            rows.append((b'%d' % dice.randrange(2), when,
                         when - dice.randrange(3), b'%03d' % number))
        rules = {rule: dice.choice((0, 0, 1, 2, 3, 7, 100))
                 for rule in RULES}
        within = dice.choice((None, None, 0, 3600, 7 * DAY, reach))
        return rows, rules, within

    def test_as_the_reference(self):
        dice = random.Random(SEED)
        for turn in range(RUNS):
            rows, rules, within = self.case(dice)
            with self.subTest(turn=turn, rules=rules, within=within):
                self.assertEqual(judge(rows, rules, within),
                                 reference(rows, rules, within))

    def test_again_deletes_nothing(self):
        dice = random.Random(SEED + 1)
        for turn in range(RUNS):
            rows, rules, within = self.case(dice)
            kept = judge(rows, rules, within)
            rest = [row for row in rows if row[3] in kept]
            self.assertEqual(judge(rest, rules, within), kept,
                             (turn, rules, within))

    def test_more_keeps_more(self):
        """A greater number, and one rule more, never delete more."""
        dice = random.Random(SEED + 2)
        for turn in range(RUNS):
            rows, rules, within = self.case(dice)
            kept = judge(rows, rules, within)
            rule = dice.choice(RULES)
            more = dict(rules, **{rule: rules[rule] + 1 + dice.randrange(5)})
            self.assertLessEqual(kept, judge(rows, more, within), turn)
            if within is not None:
                self.assertLessEqual(judge(rows, rules, None), kept, turn)

    def test_every_series_keeps_its_newest(self):
        rows = [(b'a', NOW - n * DAY, 0, b'a%d' % n) for n in range(9)]
        rows += [(b'b', NOW - n * DAY, 0, b'b%d' % n) for n in range(500, 509)]
        for rules in ({'last': 1}, {'hourly': 1}, {}):
            self.assertEqual(judge(rows, rules, None), {b'a0', b'b500'})

    def test_equal_times(self):
        """The one created later is newer, else the greater name."""
        rows = [(b's', NOW, 5, b'b'), (b's', NOW, 5, b'a'),
                (b's', NOW, 4, b'c')]
        self.assertEqual(judge(rows, {'last': 1}, None), {b'b'})
        self.assertEqual(judge(rows[1:], {'daily': 1}, None), {b'a'})

    def test_time_zone(self):
        """Days are those of TZ; two hours called 2 are two."""
        rows = [(b's', NOW - 5 * 3600, 0, b'07'), (b's', NOW, 0, b'12')]
        with zone('Etc/GMT-14'):            # 21:00 and 02:00 on two days
            self.assertEqual(judge(rows, {'daily': 2}, None),
                             {b'07', b'12'})
        self.assertEqual(judge(rows, {'daily': 2}, None), {b'12'})
        turn = calendar.timegm((2026, 10, 25, 0, 30, 0))
        rows = [(b's', turn + n * 3600, 0, b'%d' % n) for n in range(3)]
        with zone('CET-1CEST,M3.5.0,M10.5.0/3'):
            self.assertEqual(len(judge(rows, {'hourly': 3}, None)), 3)

    def test_spans(self):
        for text, seconds in (('36h', 36 * 3600), ('30d', 30 * DAY),
                              ('2w', 14 * DAY), ('1m', 31 * DAY),
                              ('1y6m', 552 * DAY), ('0d', 0)):
            self.assertEqual(tarsnap.span_parse(text), (text, seconds))
        for text in ('', '30', 'd', '1s', '-1d', '1d ', '1.5d', '1D'):
            with self.assertRaises(tarsnap.UserError, msg=text):
                tarsnap.span_parse(text)


##############################################################################
# Archives
##############################################################################


class ExpireCase(unittest.TestCase):

    def setUp(self):
        stack = zone('UTC')
        stack.__enter__()
        self.addCleanup(stack.__exit__, None, None, None)
        self.lab = lab.Lab(self)
        self.host = self.lab.host()
        with open(os.path.join(self.lab.tree, 'file'), 'wb') as file:
            file.write(b'content')

    @contextlib.contextmanager
    def at(self, when):
        """Both clocks show `when`, seconds."""
        with mock.patch.object(time, 'time', lambda: float(when)), \
                mock.patch.object(time, 'time_ns', lambda: when * 10 ** 9):
            yield

    def create(self, name, when, *args, host=None):
        with self.at(when):
            (host or self.host).create(name, *args)

    def expire(self, *args, status=0, when=NOW, host=None, **options):
        with self.at(when):
            return (host or self.host).good('--expire', *args, status=status,
                                            **options)

    def names(self):
        return sorted(self.host.good('--list-archives', cache=False
                                     ).out.split())

    def verdicts(self, *args, **options):
        """{name: why} of a dry run, which must delete nothing."""
        before = self.names()
        result = self.expire('--dry-run', *args, **options)
        self.assertEqual(self.names(), before)
        rows = [line.split('\t') for line in result.out.splitlines()]
        self.assertEqual({len(row) for row in rows} - {3}, set())
        return {row[0]: row[2] for row in rows}


class Expire(ExpireCase):

    def test_what_is_said_is_what_goes(self):
        days = ['w-2026-11-%02d' % day for day in (9, 10, 17, 18, 19, 20)]
        self.create('other', NOW - 900 * DAY)
        for name in days:
            self.create(name, calendar.timegm(
                time.strptime(name[2:], '%Y-%m-%d')) + 3600)
        rules = ('--keep-daily', '2', '--keep-weekly=2')
        said = self.verdicts(*rules)
        self.assertEqual(said, {
            'other': 'kept: daily 1 of 2, weekly 1 of 2',
            days[0]: 'deleted: no rule keeps it',
            days[1]: 'kept: weekly 2 of 2',
            days[2]: 'deleted: no rule keeps it',
            days[3]: 'deleted: no rule keeps it',
            days[4]: 'kept: daily 2 of 2',
            days[5]: 'kept: daily 1 of 2, weekly 1 of 2'})
        result = self.expire(*rules)
        self.assertEqual((result.out, result.err), ('', ''))
        kept = sorted(name for name in said if said[name].startswith('kept'))
        self.assertEqual(self.names(), kept)
        head = self.host.seq()
        self.expire(*rules)
        self.assertEqual(self.host.seq(), head)         # nothing more
        self.host.check(days[1], lab.snapshot(self.lab.tree))

    def test_verbose_and_statistics(self):
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        result = self.expire('-v', '--print-stats', '--keep-last', '1')
        self.assertEqual([line.split('\t')[0::2] for line in
                          result.out.splitlines()], [
            ['a0', 'kept: last 1 of 1'], ['a1', 'deleted: no rule keeps it'],
            ['a2', 'deleted: no rule keeps it']])
        lines = [line for line in result.err.splitlines()]
        self.assertEqual(lines[0], 'Deleting archive "a2"')     # the oldest
        self.assertEqual(lines[6], 'Deleting archive "a1"')
        self.assertTrue(lines[4].startswith('a2  '), lines[4])
        self.assertTrue(lines[5].startswith('Deleted data  '), lines[5])
        self.assertEqual(self.names(), ['a0'])

    def test_one_transaction_each(self):
        for day in (3, 2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        with lab.tapped() as log:
            self.expire('--keep-last', '1')
        self.assertEqual(log.kinds().count(tarsnap.COMMIT), 3)

    def test_series_alone(self):
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
            self.create('b%d' % day, NOW - day * DAY, '--series=t')
        self.assertEqual(len(self.verdicts('--keep-last=1', '--series=s')), 3)
        self.expire('--keep-last=1', '--series=s')
        self.assertEqual(self.names(), ['a0', 'b0', 'b1', 'b2'])
        self.expire('--keep-last=1', '--series=none')
        self.assertEqual(len(self.names()), 4)

    def test_no_rule(self):
        self.create('a', NOW)
        for args in ([], ['--keep-last', '0'], ['--dry-run']):
            result = self.expire(*args, status=1)
            self.assertIn('--expire needs a rule', result.err)
            self.assertNotIn('Traceback', result.err)

    def test_bad_values(self):
        for args in (['--keep-last', 'x'], ['--keep-last', '-1'],
                     ['--keep-daily', '1.5'], ['--keep-within', '30'],
                     ['--keep-last', '1', '--keep-last', '2'],
                     ['--keep-last', '1', 'operand']):
            result = self.expire(*args, status=1)
            self.assertNotIn('Traceback', result.err)

    def test_directives(self):
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        conf = self.lab.path('conf')
        with open(conf, 'w') as file:
            file.write('keep-last 2\nkeep-within 1h\nno-by-creation\n')
        said = self.verdicts('--configfile', conf)
        self.assertEqual(said['a1'], 'kept: last 2 of 2')
        self.assertEqual(said['a0'], 'kept: last 1 of 2, within 1h')
        # For other modes they mean nothing; the command line is first.
        self.host.good('--list-archives', '--configfile', conf)
        said = self.verdicts('--configfile', conf, '--keep-last', '1')
        self.assertTrue(said['a1'].startswith('deleted'))

    def test_json_and_nul(self):
        for day in (1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        result = self.expire('--dry-run', '--json', '--keep-last=1')
        first, second = map(json.loads, result.out.splitlines())
        self.assertEqual(second, {
            'type': 'retention', 'name': 'a1', 'kept': False,
            'created': '2026-11-19T12:00:00.000000000Z',
            'received': '2026-11-19T12:00:00.000000000Z',
            'why': 'no rule keeps it'})
        self.assertTrue(first['kept'])
        result = self.expire('--dry-run', '--null-output', '--keep-last=1')
        self.assertEqual(result.out.split('\0')[:3],
                         ['a0', '', '2026-11-20 12:00:00'])


class Doubt(ExpireCase):
    """What takes part in no rule, and stays."""

    def test_received_long_after_creation(self):
        for day in (2, 1, 0):
            self.create('new%d' % day, NOW - 60 - day * DAY, '--series=s')
        for day in range(3):
            self.create('copy%d' % day, NOW - 60 + day, '--series=s',
                        '--creationtime=%d' % (NOW - 100 * DAY - day * DAY))
        said = self.verdicts('--keep-last=1')
        self.assertEqual(said['copy1'], 'kept: created 2026-08-11 12:00:00 '
                         'but received 2026-11-20 11:59:01')
        result = self.host.run('--expire', '--keep-last=1')
        self.assertEqual(result.status, 0)
        self.assertIn('Kept 3 archives received over 26 hours from their '
                      'creation', result.err)
        self.assertEqual(self.names(), ['copy0', 'copy1', 'copy2', 'new0'])
        self.assertEqual(self.expire('--quiet', '--keep-last=1').err, '')
        result = self.expire('--by-creation', '--keep-last=2')
        self.assertEqual(result.err, '')
        self.assertEqual(self.names(), ['copy0', 'new0'])

    def test_future(self):
        self.create('old', NOW - DAY, '--series=s')
        self.create('new', NOW, '--series=s')
        self.create('future', NOW + 10 * DAY, '--series=s')
        said = self.verdicts('--keep-last=1')
        self.assertEqual(said['future'], 'kept: its date is in the future')
        self.assertEqual(said['new'], 'kept: last 1 of 1')
        self.expire('--keep-last=1')
        self.assertEqual(self.names(), ['future', 'new'])

    def test_parts(self):
        """A .part is deleted by no rule, and counts in none."""
        def dies(run, writer, series):
            checkpoint(run, writer, series)
            os._exit(7)
        checkpoint = tarsnap.Create.checkpoint
        for number in range(4):
            with open(os.path.join(self.lab.tree, 'f%d' % number),
                      'wb') as file:
                file.write(random.Random(number).randbytes(90000))
        patch = mock.patch.multiple(tarsnap.Create, checkpoint=dies,
                                    due=lambda run: True)
        with self.at(NOW - 50 * DAY):
            status = self.lab.crash(
                self.host, patch, '-c', '-f', 'cut', '--series=s',
                '--checkpoint-bytes=1000000', '-C', self.lab.tree, '.')
        self.assertEqual(status, 7)
        self.assertEqual(self.names(), ['cut.part'])
        said = self.verdicts('--keep-last=1', cache=False)
        self.assertEqual(said['cut.part'],
                         'kept: not finished, it may be being written')
        self.create('a', NOW - DAY, '--series=s')
        self.create('b', NOW, '--series=s')
        said = self.verdicts('--keep-last=1')
        self.assertEqual(said['cut.part'],
                         'kept: incomplete, only -d deletes it')
        self.expire('--keep-last=1')
        self.assertEqual(self.names(), ['b', 'cut.part'])

    def test_unreadable_record(self):
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        real = tarsnap.record_unpack

        def fails(parts, name, key):
            record = real(parts, name, key)
            if record.title == b'a2':
                raise tarsnap.CorruptError('archive record is damaged')
            return record
        with mock.patch.object(tarsnap, 'record_unpack', fails):
            result = self.expire('--keep-last=1', status=2)
        self.assertIn('its archive is kept', result.err)
        self.assertEqual(self.names(), ['a0', 'a2'])


class Keys(ExpireCase):

    def test_roles(self):
        """A pruning key is enough; reading is for a dry run only."""
        prune = self.lab.host('prune', (lab.D,))
        read = self.lab.host('read', (lab.R,))
        write = self.lab.host('write', (lab.W,))
        prune.good('--fsck')
        write.good('--fsck')
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s',
                        host=write)
        for host in (prune, read):
            self.assertEqual(len(self.verdicts('--keep-last=1', host=host,
                                               cache=False)), 3)
        for host, args in ((read, []), (write, []), (write, ['--dry-run'])):
            result = self.expire('--keep-last=1', *args, host=host, status=1)
            self.assertIn('authorization', result.err)
        self.expire('--keep-last=1', host=prune)
        self.assertEqual(self.names(), ['a0'])

    def test_another_host_deletes_meanwhile(self):
        """What was planned with archives that are gone is not done."""
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        other = self.lab.host('other')
        other.good('--fsck')
        real = tarsnap.Expire.delete

        def delete(expire, run):
            other.good('-d', '-f', 'a0')
            real(expire, run)
        with mock.patch.object(tarsnap.Expire, 'delete', delete):
            result = self.expire('--keep-last=1', status=1)
        self.assertIn('Another host deleted', result.err)
        self.assertEqual(self.names(), ['a1', 'a2'])

        def delete_same(expire, run):
            other.good('-d', '-f', 'a2')
            real(expire, run)
        with mock.patch.object(tarsnap.Expire, 'delete', delete_same):
            self.expire('--keep-last=1')
        self.assertEqual(self.names(), ['a1'])

    def test_made_again_meanwhile(self):
        """A new archive of an old one's name is not what was judged."""
        for day in (2, 1, 0):
            self.create('a%d' % day, NOW - day * DAY, '--series=s')
        other = self.lab.host('other')
        other.good('--fsck')
        real = tarsnap.Expire.delete

        def delete(expire, run):
            other.good('-d', '-f', 'a2')
            other.create('a2')
            real(expire, run)
        with mock.patch.object(tarsnap.Expire, 'delete', delete):
            self.expire('--keep-last=1')
        self.assertEqual(self.names(), ['a0', 'a2'])


if __name__ == '__main__':
    unittest.main()
