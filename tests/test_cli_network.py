# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Bandwidth limits, retries and what is said of the network: CLI 5.4, 3.11.

No test waits: the clock of the limits and the sleeps between tries are ours,
and what is compared is the time that was asked for.
"""

import functools
import os
import threading
import time
import unittest
from unittest import mock

import lab
import tarsnap
import world
from lab import LabTest

WAITS = [1, 2, 4, 8, 15, 30, 60, 90, 90]        # after two tries at once


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []
        self.lock = threading.Lock()

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.now += seconds
            self.slept.append(seconds)

    def limits(self):
        """Limits go by this clock."""
        return mock.patch.object(tarsnap, 'Limit', functools.partial(
            tarsnap.Limit, clock=self.monotonic, sleep=self.sleep))

    def listening(self):
        """A channel does not really wait for its limits either."""
        real = tarsnap.Channel.listen

        def listen(channel, selector, waits=()):
            waits = list(filter(None, waits))
            if waits:
                self.sleep(min(waits))
                waits = [0.0002]
            real(channel, selector, waits)

        return mock.patch.object(tarsnap.Channel, 'listen', listen)

    def between_tries(self):
        """tarsnap.time with this sleep."""
        class Time:
            sleep = staticmethod(self.sleep)
            __getattr__ = staticmethod(functools.partial(getattr, time))

        return mock.patch.object(tarsnap, 'time', Time())


class Rates(unittest.TestCase):

    def test_as_many_bytes_as_the_time_allows(self):
        for rate in (8000.0, 123456.5, 1e9):
            clock = Clock()
            limit = tarsnap.Limit(rate, clock.monotonic, clock.sleep)
            for size in [1, 300000, 70, 4096] * 100:
                limit.pass_through(size)
            self.assertAlmostEqual(sum(clock.slept), 30416700 / rate,
                                   delta=tarsnap.LIMIT_SECONDS * 1.01)

    def test_what_was_not_used_is_lost(self):
        clock = Clock()
        limit = tarsnap.Limit(1000.0, clock.monotonic, clock.sleep)
        clock.now += 3600
        limit.pass_through(1000)
        self.assertAlmostEqual(sum(clock.slept), 0.9)


class Embedded(LabTest):

    def setUp(self):
        super().setUp()
        for number in range(20):
            self.write('f%d' % number, os.urandom(100000))
        self.clock = Clock()

    def run_c(self, name, *args):
        with self.clock.limits(), lab.tapped() as log:
            self.host.create(name, *args)
        return sum(10 + len(body) for _, body in log)

    def test_maxbw_rate_up(self):
        sent = self.run_c('one', '--maxbw-rate-up=1e5')
        self.assertGreater(sent, 2000000)
        self.assertAlmostEqual(sum(self.clock.slept), sent / 1e5,
                               delta=sent / 1e6)

    def test_maxbw_rate_down(self):
        self.run_c('one', '--maxbw-rate-down=1e5')
        self.assertLess(sum(self.clock.slept), 1)
        self.assertEqual(self.host.seq(), os.readlink(
            os.path.join(self.host.cache, 'cseq')))
        with self.clock.limits():
            self.host.extract('one', '--maxbw-rate-down=1e5')
        self.assertAlmostEqual(sum(self.clock.slept), 20.5, delta=2)

    def test_maxbw_rate_is_both(self):
        self.run_c('one', '--maxbw-rate=1e6')
        up = sum(self.clock.slept)
        self.assertAlmostEqual(up, 2.05, delta=0.2)
        with self.clock.limits():
            self.host.extract('one', '--maxbw-rate=1e6')
        self.assertAlmostEqual(sum(self.clock.slept) - up, 2.05, delta=0.2)


class Tls(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'front')
        w.keygen()

    def setUp(self):
        self.clock = Clock()
        self.world.front.hook = world.pass_all

    def client(self, *args):
        w = self.world
        return lab.run(['--no-default-config', '--keyfile', w.key,
                        '--cachedir', w.path('cache'), *args])

    def run_c(self, name, *args):
        """-c of a tree of 2 MB of its own."""
        for number in range(20):
            world.write(self.world.path(name, 'f%d' % number),
                        world.noise(100000, name + str(number)))
        return self.client('-c', '-f', name, *args, '-C', self.world.root,
                           name)

    def test_maxbw_rate_over_tls(self):
        with self.clock.limits(), self.clock.listening():
            result = self.run_c('limited', '--maxbw-rate-up', '2e5')
            self.assertEqual(result.status, 0, result)
            self.assertAlmostEqual(sum(self.clock.slept), 2.05e6 / 2e5,
                                   delta=1)
            self.clock.slept.clear()
            os.mkdir(self.world.path('out'))
            result = self.client('-x', '-f', 'limited', '--maxbw-rate-down',
                                 '1e5', '-C', self.world.path('out'))
            self.assertEqual(result.status, 0, result)
            self.assertAlmostEqual(sum(self.clock.slept), 2.05e6 / 1e5,
                                   delta=2)
        world.tree_equal(self, self.world.path('limited'),
                         self.world.path('out', 'limited'))

    def test_a_server_that_always_breaks_off_is_given_up(self):
        def hook(wire, up, kind, body):
            return world.CUT if up and kind == world.BEGIN else world.PASS

        self.world.front.hook = hook
        with self.clock.between_tries():
            result = self.run_c('broken')
        self.assertEqual(result.status, 1)
        self.assertRegex(result.err, r'(?m)^tarsnap: Too many network '
                                     r'failures: Connection .*$')
        self.assertEqual(self.clock.slept, WAITS)

    def test_cut_once_in_a_while_is_nothing(self):
        count = [0]

        def hook(wire, up, kind, body):
            count[0] += up and kind == world.PUT
            return world.CUT if count[0] % 7 == 3 and up \
                and kind == world.PUT and count[0] < 60 else world.PASS

        self.world.front.hook = hook
        with self.clock.between_tries():
            result = self.run_c('flapping')
        self.assertEqual((result.status, result.err), (0, ''))
        self.assertLess(sum(self.clock.slept), 10)


class Tries(unittest.TestCase):
    """The schedule, by a Remote that reaches nothing for a while."""

    def setUp(self):
        self.clock = Clock()
        self.said = []
        for patch in (self.clock.between_tries(), mock.patch.object(
                tarsnap, 'warn', self.said.append)):
            patch.start()
            self.addCleanup(patch.stop)

    def remote(self, failing, reached=True, **options):
        remote = tarsnap.Remote(None, (), 'host:1', **options)
        remote.reached = reached
        left = [failing]

        def connect_once():
            left[0] -= 1
            if left[0] >= 0:
                raise tarsnap.ChannelLost('no route %d' % left[0])
            return mock.Mock(failed=None)

        remote.connect_once = connect_once
        return remote

    def test_gives_up_after_eleven(self):
        with self.assertRaisesRegex(tarsnap.RemoteError,
                                    '^Too many network failures: no route'):
            self.remote(100).connect()
        self.assertEqual(self.clock.slept, WAITS)
        self.assertEqual(self.said, ['no route 93; trying again'])

    def test_three_where_nothing_was_ever_reached(self):
        with self.assertRaisesRegex(tarsnap.RemoteError, '^Too many'):
            self.remote(100, False).connect()
        self.assertEqual((self.clock.slept, self.said), ([1], []))

    def test_silent_below_30_seconds(self):
        self.remote(6).connect()
        self.assertEqual((self.clock.slept, self.said), (WAITS[:5], []))

    def test_back(self):
        self.remote(10).connect()
        self.assertEqual(self.clock.slept, WAITS)
        self.assertEqual(self.said, ['no route 3; trying again',
                                     'Connection to host:1 is back'])

    def test_noisy_warnings(self):
        self.remote(2, noisy=True).connect()
        self.assertEqual(self.said, [
            'no route 1; trying again', 'no route 0; trying again',
            'Connection to host:1 is back'])

    def test_retry_forever(self):
        for reached in (True, False):
            self.clock.slept.clear()
            self.remote(40, reached, forever=True).connect()
            self.assertEqual(self.clock.slept, WAITS + [90] * 30)


class Options(LabTest):

    def limits(self, *args, config=''):
        path = self.lab.path('conf')
        with open(path, 'w') as file:
            file.write(config)
        parser = tarsnap.Parser(['--no-default-config', '--configfile', path,
                                 '--list-archives', *args])
        opt = parser.parse()
        parser.config_defaults()
        opt.finish()
        return [limit and limit.rate for limit in opt.limits]

    def test_what_counts(self):
        for args, config, wanted in (
                ((), '', [None, None]),
                (('--maxbw-rate', '9000'), '', [9000, 9000]),
                (('--maxbw-rate-up=1e6',), '', [1e6, None]),
                (('--maxbw-rate-up=1e6', '--maxbw-rate=1e5'), '',
                 [1e6, 1e5]),
                (('--maxbw-rate=1e5', '--no-maxbw-rate-down'), '',
                 [1e5, None]),
                (('--maxbw-rate=1e5',), 'maxbw-rate-up 20000\n',
                 [1e5, 1e5]),
                (('--maxbw-rate-down=1e5',), 'maxbw-rate 20000\n',
                 [20000, 1e5]),
                (('--no-maxbw-rate-up',), 'maxbw-rate 20000\n',
                 [None, 20000]),
                ((), 'maxbw-rate 20000\nmaxbw-rate-up 30000\n',
                 [30000, 20000])):
            with self.subTest(args=args, config=config):
                self.assertEqual(self.limits(*args, config=config), wanted)

    def test_bounds(self):
        for value in ('7999', '1.1e9', '100k', 'x', ''):
            result = lab.run(['--no-default-config', '--list-archives',
                              '--maxbw-rate', value])
            self.assertEqual(result.status, 1, value)
        result = lab.run(['--no-default-config', '--list-archives',
                          '--no-maxbw-rate'])
        self.assertIn('Ambiguous option', result.err)

    def test_aggressive_networking(self):
        self.write('f', b'x')
        self.assertEqual(self.host.good(
            '-c', '-f', 'one', '--aggressive-networking', '-C',
            self.lab.tree, 'f').err.count('\n'), 1)     # cachedir created
        self.assertIn('aggressive', self.host.good(
            '-c', '-f', 'two', '--aggressive-networking', '--maxbw-rate-up',
            '1e6', '-C', self.lab.tree, 'f').err)
        for mode in (('--list-archives',), ('-t', '-f', 'one'),
                     ('--print-stats',), ('-d', '-f', 'two')):
            self.assertEqual(self.host.good(
                '--no-aggressive-networking', *mode).err, '')
        self.assertEqual(self.host.run(
            '--aggressive-networking', '--list-archives').status, 1)

    def test_addresses(self):
        """The three texts by which others know that the network is away."""
        clock = Clock()
        self.host.good('--initialize-cachedir')
        for server, text in (
                ('nonsense', 'Cannot obtain server address'),
                ('host:99999', 'Cannot obtain server address'),
                ('ssh://', 'Cannot obtain server address'),
                ('nobody.invalid:9', 'Too many network failures: Error '
                 'looking up nobody.invalid: '),
                ('127.0.0.1:1', 'Too many network failures: Cannot connect '
                 'to 127.0.0.1:1: Connection refused')):
            with self.subTest(server), clock.between_tries():
                result = self.host.run('--list-archives', '--server', server)
                self.assertEqual(result.status, 1)
                self.assertTrue(result.err.startswith('tarsnap: ' + text),
                                result)


if __name__ == '__main__':
    unittest.main()
