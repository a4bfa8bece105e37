# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The benchmarks run, and write what they say they write.

On trees of a few files: no figure means anything here, only that each work of
each program was done and stands in the document and in the chart.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.abspath(__file__))
BENCH = os.path.join(os.path.dirname(HERE), 'bench')
sys.path.insert(0, BENCH)

import network      # noqa: E402
import trees        # noqa: E402


class Benchmarks(unittest.TestCase):

    def setUp(self):
        self.base = tempfile.TemporaryDirectory()
        self.addCleanup(self.base.cleanup)
        self.tree = os.path.join(self.base.name, 'tree')
        trees.tiny(self.tree, 30)

    def run_bench(self, name, *words):
        """Run one; (its document, what it printed)."""
        path = os.path.join(self.base.name, name + '.json')
        done = subprocess.run(
            [sys.executable, os.path.join(BENCH, name + '.py'), '--runs', '1',
             '--json', path, '--dir', self.base.name, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertEqual(set(os.listdir(self.base.name)),
                         {'tree', name + '.json'})
        with open(path) as file:
            document = json.load(file)
        self.assertEqual(document['benchmark'], name)
        self.assertIn('processors', document['machine'])
        self.assertIn('tarsnap', document['versions'])
        for figure in document['figures']:
            self.assertEqual(len(figure['runs']), 1, figure)
            for key, value in figure['runs'][0].items():
                self.assertTrue(math.isfinite(value) and value >= 0, figure)
                self.assertEqual(figure[key], dict.fromkeys(
                    ('median', 'least', 'most'), value))
        return document, done.stdout

    def test_compare_and_chart(self):
        works = ('start', 'first', 'unchanged', 'list', 'restore', 'delete')
        document, said = self.run_bench(
            'compare', '--tree', self.tree, '--programs',
            'embedded,isal,tls,floor,packing')
        found = {(figure['work'], figure['program'])
                 for figure in document['figures']}
        stored = {('stored after first', name)
                  for name in ('embedded', 'isal', 'tls')}
        self.assertEqual(found, stored | {
            (work, name) for work in works for name in ('embedded', 'tls')}
            | {(work, 'floor') for work in ('first', 'unchanged', 'restore')}
            | {('first', 'isal'), ('first', 'packing')})
        self.assertIn('30 files', said)
        for half in ('local', 'network'):
            with self.subTest(half):
                self.chart(self.tree, half)

    def chart(self, tree, half):
        """The chart is well-formed and has a bar for each figure."""
        source = os.path.join(self.base.name, 'compare.json')
        target = os.path.join(self.base.name, 'chart.svg')
        subprocess.run(
            [sys.executable, os.path.join(BENCH, 'chart.py'), source, target,
             tree, half], check=True)
        root = xml.etree.ElementTree.parse(target).getroot()
        with open(source) as file:
            wanted = [figure for figure in json.load(file)['figures']
                      if figure['half'] == half and figure['work'] != 'start']
        self.assertEqual(
            len([bar for bar in root.findall('{*}rect')
                 if bar.get('class') != 'page']), len(wanted))
        os.unlink(target)

    def test_what_is_refused(self):
        for words, says in (
                (('--runs', '0'), 'argument --runs: invalid positive value'),
                (('--tree', self.base.name + '/none'), 'no such directory'),
                (('--programs', 'embedded,none'), 'unknown in --programs'),
                (('--works', 'none'), 'unknown in --works')):
            with self.subTest(words):
                done = subprocess.run(
                    [sys.executable, os.path.join(BENCH, 'compare.py'),
                     *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stdout), (2, b''))
                self.assertIn(says, done.stderr.decode())

    def test_peers_by_turns(self):
        # Whatever is installed, and the shifted file.
        document, said = self.run_bench(
            'compare', '--tree', 'file', '--size', '20000', '--works',
            'shifted', '--programs', 'borg-serve,restic-rest')
        for figure in document['figures']:
            self.assertIn(figure['work'], (
                'first', 'shifted', 'stored after first',
                'stored after shifted'))
        for name in document['arguments']['programs']:
            with self.subTest(name):
                works = {figure['work'] for figure in document['figures']
                         if figure['program'] == name}
                if name + ': not installed' in said:
                    self.assertEqual(works, set())
                else:
                    self.assertEqual(len(works), 4)

    def test_growth(self):
        document, _ = self.run_bench(
            'growth', '--quick')
        works = {'files': ['first', 'unchanged', 'list', 'delete'],
                 'archives': ['unchanged', 'list-archives', 'delete'],
                 'gb': ['fill', 'unchanged', 'delete', 'stats', 'rebuild',
                        'fsck'],
                 'blocks': ['session', 'commit', 'rebuild']}
        self.assertEqual(
            [(slope['series'], slope['work'])
             for slope in document['slopes']],
            [(series, work) for series in works for work in works[series]])
        self.assertEqual(len(document['figures']), 32)

    def test_network(self):
        document, _ = self.run_bench(
            'network', '--quick')
        figures = {(figure['work'], figure['archives']): figure['runs'][0]
                   for figure in document['figures']}
        self.assertEqual(set(figures), {
            ('first', 1), ('unchanged', 1), ('delete', 2), ('list', 1),
            ('restore', 1), ('lists', 1), ('lists', 3), ('list', 3),
            ('stats', 3), ('unchanged', 3), ('delete', 3)})
        for work, run in figures.items():
            with self.subTest(work):
                # Connection, TLS, statement and proof, at least.
                self.assertEqual(run['connections'], 1)
                self.assertGreater(run['round_trips'], 3)
                self.assertGreaterEqual(run['seconds'],
                                        run['round_trips'] * 0.004)
        self.assertGreater(figures['first', 1]['bytes_up'], 40000)
        self.assertGreater(figures['restore', 1]['bytes_down'], 40000)

    def test_rebuild(self):
        document, _ = self.run_bench('rebuild', '--entries', '900',
                                     '--stores', 'directory,floor')
        rebuilt, floor = document['figures']
        self.assertEqual((rebuilt['work'], floor['work']),
                         ('rebuild', 'floor'))
        # Its tables and log, and nothing of the blocks.
        self.assertTrue(900 * 77 < rebuilt['read']['most'] < 900 * 85,
                        rebuilt)

    def test_bill(self):
        path = os.path.join(self.base.name, 'bill.json')
        done = subprocess.run(
            [sys.executable, os.path.join(BENCH, 'bill.py'), '--accounts',
             '4', '--machines', '20', '--days', '1', '--json', path],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        with open(path) as file:
            document = json.load(file)
        self.assertEqual([name for name, _, _ in document['figures']],
                         ['first day', 'ordinary day 1', 'end of a month',
                          'all standings change'])
        # Of each account a standing before and after, and a mail.
        self.assertGreater(document['sizes']['standing'], 4 * 2 * 100)
        self.assertGreater(document['sizes']['mail'], 4 * 200)

    def test_load(self):
        document, _ = self.run_bench(
            'load', '--quick')
        figures = {figure['phase']: figure for figure in document['figures']}
        self.assertEqual(set(figures), {'idle', 'put', 'get', 'both'})
        for phase, keys in (('put', ['commit']), ('get', ['get']),
                            ('both', ['commit', 'get'])):
            with self.subTest(phase):
                for key in [one + '_p50' for one in keys] + [
                        'bytes_per_second', 'bytes_per_server_cpu_second',
                        'server_peak']:
                    self.assertGreater(figures[phase][key]['median'], 0)


class Counting(unittest.TestCase):

    def test_round_trips(self):
        # Three things at once are one round trip; one after the other, three.
        for answered, trips in ((False, 1), (True, 3)):
            counts = network.Counts()
            stamps = []
            for _ in range(3):
                counts.arrived(1, counts.sent(0, 10))
                stamps.append(counts.sent(1, 20))
                if answered:
                    counts.arrived(0, stamps.pop())
            for stamp in stamps:
                counts.arrived(0, stamp)
            self.assertEqual(counts.figures(), {
                'round_trips': trips, 'connections': 0, 'bytes_up': 30,
                'bytes_down': 60})


if __name__ == '__main__':
    unittest.main()
