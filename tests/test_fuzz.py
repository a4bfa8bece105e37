# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Hostile bytes meet nothing but errors of the project's own: a seeded share
of what `make fuzz` does, and the bytes that once met something else.
"""

import os
import signal
import tempfile
import unittest
from unittest import mock

import fuzz
from world import seed_choose

# Cases of each target: about 15 s of CPU in all.
SHARE = {'tar': 150, 'cpio': 150, 'tar-pipe': 150, 'cachedir': 12,
         'index': 60, 'member': 400, 'stranger': 700, 'spool': 500,
         'tarsnapd.conf': 200, 'tarsnap.conf': 200, 'keyfile-scrypt': 100}
OTHERS = 2000

# target -> cases that once broke it, in hexadecimal.
REGRESSIONS = {
    'extract': (
        # More rows than there are; a list of revived blocks of odd length.
        '00' + b'tarsnap-extract1'.hex() + '00000400' + '00' * 32,
        '00' + b'tarsnap-extract1'.hex() + '00000001' + '00' * 32 + '72'
        + '00000001' + '00' * 33),
    # A COMMIT_OBJECT too short for its time.
    'answers': ('0087020400',),
}


class Fuzz(unittest.TestCase):

    def setUp(self):
        before = signal.signal(signal.SIGALRM, fuzz.alarm)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        scratch = fuzz.scratch()
        scratch.__enter__()
        self.addCleanup(scratch.__exit__, None, None, None)

    def test_a_share_of_every_target(self):
        seed = seed_choose('the share of make fuzz')
        found = []
        for name in fuzz.TARGETS:
            found += fuzz.fuzz([name], seed, cases=SHARE.get(name, OTHERS),
                               say=lambda line: None)
        self.assertEqual([(name, error, data.hex()[:400])
                          for name, error, data in found], [])

    def test_what_was_found_stays_mended(self):
        for name, cases in REGRESSIONS.items():
            case = fuzz.Case(name)
            for data in cases:
                case(bytes.fromhex(data))
            self.assertEqual([error for error, _ in case.found], [], name)

    def test_every_sample_is_good(self):
        """Or the cases would only scratch the surface."""
        for name in ('commit', 'log', 'segment', 'extract', 'keyfile',
                     'keyfile-scrypt', 'sealed', 'plain', 'record', 'block',
                     'dates', 'rename', 'tarsnapd.conf'):
            samples, run = fuzz.TARGETS[name][0]()
            good = 0
            for sample in samples:
                try:
                    run(sample)
                    good += 1
                except fuzz.CLIENT + fuzz.SERVER:
                    pass
            self.assertGreaterEqual(good, 1, name)
        for name in ('tar', 'cpio'):
            samples, run = fuzz.TARGETS[name][0]()
            for sample in samples:
                self.assertEqual(run(sample).status, 0, name)

    def test_nothing_is_left_behind(self):
        """Also of a target whose process dies."""
        def deadly():
            os.mkdir(os.path.join(tempfile.mkdtemp(prefix='fuzz-'), 'd'))
            os._exit(1)

        fuzz.TARGETS['deadly'] = deadly, ()
        self.addCleanup(fuzz.TARGETS.pop, 'deadly')
        with tempfile.TemporaryDirectory() as top, \
                mock.patch.object(tempfile, 'tempdir', top):
            found = fuzz.fuzz(['deadly', 'spool', 'cachedir'], 1, cases=3,
                              say=lambda line: None)
            self.assertEqual([name for name, _, _ in found], ['deadly'])
            self.assertEqual(os.listdir(top), [])

    def test_a_defect_is_found(self):
        """Of each kind: exception, hang, memory, and answers."""
        hoard = []

        def broken(data):
            if data == b'grow':
                hoard.append(bytearray(fuzz.GROWTH * 2))
            if data == b'hang':
                raise fuzz.Hang('late')
            if data == b'raise':
                raise KeyError('oops')
            if data == b'refuse':
                raise fuzz.tarsnap.CorruptError('fine')

        fuzz.TARGETS['broken'] = lambda: ([], broken), fuzz.CLIENT
        self.addCleanup(fuzz.TARGETS.pop, 'broken')
        case = fuzz.Case('broken')
        case.count = 100
        for data in (b'refuse', b'', b'raise', b'hang', b'grow'):
            case(data)
        self.assertEqual([data for _, data in case.found],
                         [b'raise', b'hang', b'grow'])


if __name__ == '__main__':
    unittest.main()
