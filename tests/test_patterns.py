# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Patterns: the rules of --exclude, --include and operands, and how paths
are shown."""

import unittest

from tarsnap import Patterns, path_escape

TREE = (b'.', b'./a', b'./dir1', b'./dir1/b', b'./dir1/c', b'./dir2',
        b'./dir2/d')

# (pattern, path, excluded by --exclude PATTERN, picked by operand PATTERN)
CASES = (
    (b'a', b'a', True, True),
    (b'a', b'ab', False, False),
    (b'a', b'a/b', True, True),
    (b'a', b'b/a', True, False),
    (b'a', b'b/a/c', True, False),
    (b'a/b', b'x/a/b', True, False),
    (b'a/b', b'x/a/b/c', True, False),
    (b'a/b', b'xa/b', False, False),
    (b'a/', b'a', True, True),
    (b'a/', b'a/b', True, True),
    (b'./a', b'a', True, True),
    (b'a', b'./a', True, True),
    (b'./a', b'./a/b', True, True),
    (b'.', b'./a', False, False),
    (b'.', b'.', True, True),
    (b'/a', b'a', False, False),
    (b'/a', b'/a', True, True),
    (b'/a', b'/a/b', True, True),
    (b'/a', b'b/a', False, False),
    (b'/', b'/a', True, True),
    (b'/', b'a', False, False),
    (b'a', b'/a', True, False),
    (b'*.o', b'a.o', True, True),
    (b'*.o', b'x/y/a.o', True, True),
    (b'*.o', b'x.o/y', True, True),
    (b'*.o', b'a.oo', False, False),
    (b'x/*.o', b'x/y/z.o', True, True),
    (b'x*z', b'x/y/z', True, True),
    (b'*', b'anything/at all', True, True),
    (b'a**b', b'a/x/b', True, True),
    (b'a?c', b'abc', True, True),
    (b'a?c', b'a/c', True, True),
    (b'a?c', b'ac', False, False),
    (b'[a-c]x', b'bx', True, True),
    (b'[a-c]x', b'dx', False, False),
    (b'[!a-c]x', b'dx', True, True),
    (b'[^a-c]x', b'ax', False, False),
    (b'[]x]y', b']y', True, True),
    (b'[a\\]]y', b']y', True, True),
    (b'[a-]y', b'-y', True, True),
    (b'[ab', b'[ab', True, True),
    (b'[ab', b'a', False, False),
    (b'a\\*b', b'a*b', True, True),
    (b'a\\*b', b'axb', False, False),
    (b'\\?\\[\\]\\{\\}\\*', b'?[]{}*', True, True),
    (b'a.c', b'abc', False, False),
    (b'a+', b'a+', True, True),
    (b'(a|b)$', b'(a|b)$', True, True),
    (b'(a|b)$', b'a', False, False),
    (b'a//b', b'a/b', True, True),
    (b'\xff*', b'\xffx', True, True),
    (b'\xff', b'\xff', True, True),
    (b'a\nb', b'a\nb', True, True),
    (b'a*', b'a\nb', True, True),
    (b'a?b', b'a\nb', True, True),
    (b'a', b'a\n', False, False),
    (b'a*c', b'abc\n', False, False),
    (b'', b'a', False, False),
)


class PatternTest(unittest.TestCase):

    def test_every_rule(self):
        for pattern, path, excluded, picked in CASES:
            with self.subTest(pattern=pattern, path=path):
                self.assertEqual(Patterns([pattern]).excluded(path),
                                 excluded)
                self.assertEqual(
                    Patterns([], [], [pattern]).included(path), picked)
                self.assertEqual(Patterns([], [pattern]).included(path),
                                 picked)

    def walk(self, exclude=(), include=()):
        """What a walk that does not descend into what is left out takes."""
        patterns, out = Patterns(exclude, include), []
        for path in TREE:
            above = path.rpartition(b'/')[0]
            if (not above or above in out) and patterns.selected(path):
                out.append(path)
        return out

    def test_golden_walks(self):
        self.assertEqual(self.walk(), list(TREE))
        self.assertEqual(self.walk([b'dir1']),
                         [b'.', b'./a', b'./dir2', b'./dir2/d'])
        self.assertEqual(self.walk([], [b'.', b'dir1']),
                         [b'.', b'./dir1', b'./dir1/b', b'./dir1/c'])
        self.assertEqual(self.walk([b'b'], [b'.', b'dir1']),
                         [b'.', b'./dir1', b'./dir1/c'])
        self.assertEqual(self.walk([], [b'dir1']), [])

    def test_exclude_wins(self):
        patterns = Patterns([b'*.o'], [b'a'], [b'b'])
        self.assertTrue(patterns.selected(b'a/x'))
        self.assertTrue(patterns.selected(b'b/x'))
        self.assertFalse(patterns.selected(b'a/x.o'))
        self.assertFalse(patterns.selected(b'c'))

    def test_operands_not_met_are_told_in_order(self):
        patterns = Patterns([], [b'inc'], [b'z*', b'a', b'm/n', b'a/b'])
        patterns.selected(b'a/b/c')
        self.assertEqual(patterns.unmatched(), [b'z*', b'm/n'])
        patterns.selected(b'm/n')
        patterns.selected(b'zz')
        self.assertEqual(patterns.unmatched(), [])

    def test_what_is_excluded_does_not_meet_an_operand(self):
        patterns = Patterns([b'a'], [], [b'a'])
        self.assertFalse(patterns.selected(b'a'))
        self.assertEqual(patterns.unmatched(), [b'a'])

    def test_literals(self):
        self.assertEqual(Patterns([], [b'./x/'], [b'a\\*']).literals(),
                         {b'x', b'a*'})
        self.assertIsNone(Patterns([], [b'x'], [b'a*']).literals())
        self.assertIsNone(Patterns([b'x']).literals())

    def test_no_pattern_is_seen_at_once(self):
        self.assertFalse(Patterns().any)
        self.assertTrue(Patterns().selected(b'x'))
        for given in ((b'x',), (), ()), ((), (b'x',), ()), ((), (), (b'x',)):
            self.assertTrue(Patterns(*given).any)

    def test_ten_thousand_names_cost_little_each(self):
        names = [b'd/%d' % number for number in range(10000)]
        patterns = Patterns(names, [], names)
        for name in names:
            self.assertTrue(patterns.included(b'./' + name + b'/x'))
        self.assertEqual(patterns.unmatched(), [])


class ShowTest(unittest.TestCase):

    def test_escapes(self):
        for path, shown in (
                (b'plain name', b'plain name'),
                (b'a\nb\tc', b'a\\nb\\tc'),
                (b'back\\slash', b'back\\\\slash'),
                (b'\x1b[31m', b'\\033[31m'),
                (b'\x7f', b'\\177'),
                (b'\xff\xc3\xa9', b'\\377\xc3\xa9'),
                ('\u00e9\u4e2d'.encode(), '\u00e9\u4e2d'.encode()),
                ('\u009b'.encode(), b'\\302\\233')):
            self.assertEqual(path_escape(path), shown)


if __name__ == '__main__':
    unittest.main()
