# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""New names by -s: its expressions, and what -c and -x make of them."""

import os
import unittest

import lab
from tarsnap import Rename, Rule, UserError, path_text

RULES = (
    # what it shows, rules, name, new name
    ('the first match', ['/a/X/'], b'banana', b'bXnana'),
    ('g repeats', ['/a/X/g'], b'banana', b'bXnXnX'),
    ('any delimiter', [',^,pre/,'], b'a/b', b'pre/a/b'),
    ('an escaped delimiter', [r'/a\/b/c\/d/'], b'a/b', b'c/d'),
    ('~ is the whole match', ['/b*/<~>/'], b'bbc', b'<bb>c'),
    (r'\~ is itself', [r'/b/\~/'], b'b', b'~'),
    ('& is itself', ['/b/&/'], b'b', b'&'),
    ('groups', [r'/\(.*\)-\(.*\)/\2-\1/'], b'a-b', b'b-a'),
    ('a group not met', [r'/\(x\)*a/<\1>/'], b'a', b'<>'),
    ('a group met again', [r'/\(.\)\1/2\1/'], b'xaab', b'x2ab'),
    ('the first rule that matches', ['/x/1/', '/a/2/', '/a/3/'], b'aa',
     b'2a'),
    ('g goes on to the next', ['/a/2/g', '/2/3/'], b'aa', b'32'),
    ('nothing is left', ['/.*//'], b'abc', b''),
    ('no match', ['/x/y/'], b'abc', b'abc'),
    ('counts', [r'/[[:digit:]]\{2,3\}$/n/'], b'a1234', b'a1n'),
    ('a count without end', [r'/a\{2,\}/n/'], b'baaa', b'bn'),
    ('* where nothing is to repeat', ['/*/x/'], b'a*', b'ax'),
    ('* after a group opens', [r'/\(*\)/x/'], b'a*', b'ax'),
    ('^ not at the start', ['/a^b/x/'], b'a^b', b'x'),
    ('$ not at the end', ['/a$b/x/'], b'a$b', b'x'),
    ('$ is the end, not a newline', ['/a$/x/'], b'a\n', b'a\n'),
    ('+ ? | ( ) { } are themselves', ['/+?|(){}/x/'], b'+?|(){}', b'x'),
    ('] first in a class', ['/[]a]/x/'], b']', b'x'),
    ('a negated class', ['/[^]a]/x/'], b']ab', b']ax'),
    ('a range', ['/[b-d]/x/g'], b'abcde', b'axxxe'),
    ('- at the end', ['/[a-]/x/g'], b'a-b', b'xxb'),
    ('a backslash in a class', [r'/[\.]/x/g'], b'a\\.', b'axx'),
    ('alternatives', [r'/^\(a\|b\)$/x/'], b'b', b'x'),
    ('. is a character', ['/^.//'], '\u00e9a'.encode(), b'a'),
    ('. is a newline too', ['/a.b/x/'], b'a\nb', b'x'),
    ('any byte', [b'/\xff/y/'], b'a\xff', b'ay'),
    ('a byte that stays', ['/a/b/'], b'a\xff\xfe', b'b\xff\xfe'),
)
BAD = ('', 'a', '/', '/a', '/a/b', '/a/b/x', r'/[a/b/', r'/\(a/b/',
       r'/a/\1/', r'/a\{x\}/b/', r'/\{2\}/b/', r'/a\{3,2\}/b/', r'/[b-a]/x/',
       '/[[:foo:]]/x/')


class RuleTest(unittest.TestCase):

    def test_every_rule(self):
        for what, rules, name, new in RULES:
            with self.subTest(what):
                self.assertEqual(Rename([
                    Rule(path_text(os.fsencode(rule)))
                    for rule in rules])(name), new)

    def test_what_is_no_rule(self):
        for text in BAD:
            with self.subTest(text):
                self.assertRaises(UserError, Rule, text)


class ProgramTest(lab.LabTest):

    def members(self, name, *args):
        return self.host.good('-t', '-f', name, *args,
                              cache=False).out.splitlines()

    def test_c_stores_under_the_new_name(self):
        self.write('d/f', b'text')
        os.symlink('d/f', self.lab.path('tree', 'link'))
        result = self.host.good('-c', '-v', '-f', 'a', '-s', '/^d/new/p',
                                '-C', self.lab.tree, 'd', 'link')
        # The first line is about the cache directory.
        self.assertEqual(result.err.splitlines()[1:], [
            'd >> new', 'a new', 'd/f >> new/f', 'a new/f', 'a link'])
        self.assertEqual(self.members('a'), ['new/', 'new/f', 'link'])
        where = self.host.extract('a')
        with open(os.path.join(where, 'new', 'f'), 'rb') as file:
            self.assertEqual(file.read(), b'text')
        self.assertEqual(os.readlink(os.path.join(where, 'link')), 'd/f')

    def test_s_flag_changes_targets_and_the_next_run_sees_it(self):
        self.write('f')
        os.symlink('d/f', self.lab.path('tree', 'link'))
        for name, rules, target in (
                ('plain', (), 'd/f'), ('names only', ('/^d/x/',), 'd/f'),
                ('targets', ('/^d/x/s',), 'x/f'),
                ('other', ('/^d/yy/s',), 'yy/f'), ('again', (), 'd/f')):
            with self.subTest(name):
                self.host.good('-c', '-f', name, *[
                    word for rule in rules for word in ('-s', rule)],
                    '-C', self.lab.tree, '.')
                where = self.host.extract(name)
                self.assertEqual(os.readlink(os.path.join(where, 'link')),
                                 target)

    def test_an_empty_name_is_left_out_what_is_below_is_not(self):
        self.write('d/f')
        for mode in 'cx':
            with self.subTest(mode):
                rule = ['-s', '|^d/*||']
                self.host.good('-c', '-f', mode,
                               *(rule if mode == 'c' else ()),
                               '-C', self.lab.tree, 'd')
                where = self.host.extract(
                    mode, *(rule if mode == 'x' else ()))
                self.assertEqual(os.listdir(where), ['f'])

    def test_the_rule_sees_leading_slashes(self):
        self.write('f')
        result = self.host.good(
            '-c', '-f', 'a', '-s', ',^%s,/x,' % self.lab.tree,
            self.lab.tree)
        self.assertEqual(result.err.count("Removing leading '/'"), 1)
        self.assertEqual(self.members('a'), ['x/', 'x/f'])
        # None is left to be removed.
        result = self.host.good(
            '-c', '-f', 'b', '-s', ',^%s,x,' % self.lab.tree, self.lab.tree)
        self.assertEqual(result.err, '')
        self.assertEqual(self.members('b'), ['x/', 'x/f'])

    def test_x_and_t_show_the_new_names(self):
        self.write('d/f', b'text')
        os.link(self.lab.path('tree', 'd', 'f'),
                self.lab.path('tree', 'd', 'g'))
        os.symlink('f', self.lab.path('tree', 'd', 'l'))
        self.host.create('a', 'd')
        rule = ('-s', r'|^d/\(.\)|new/\1\1|', '-s', '|^f$|ff|s')
        self.assertEqual(self.members('a', *rule),
                         ['d/', 'new/ff', 'new/gg', 'new/ll'])
        where = os.path.join(self.host.extract('a', *rule), 'new')
        self.assertEqual(sorted(os.listdir(where)), ['ff', 'gg', 'll'])
        self.assertTrue(os.path.samefile(os.path.join(where, 'ff'),
                                         os.path.join(where, 'gg')))
        self.assertEqual(os.readlink(os.path.join(where, 'll')), 'ff')

    def test_x_still_guards_the_target(self):
        self.write('f')
        self.host.create('a', 'f')
        where = self.lab.fresh()
        os.mkdir(where)
        result = self.host.run('-x', '-f', 'a', '-C', where, '-s',
                               ',^,../,', cache=False)
        self.assertEqual(result.status, 1)
        self.assertEqual(os.listdir(where), [])
        self.assertFalse(os.path.exists(os.path.join(where, '..', 'f')))

    def test_patterns_come_before_s(self):
        self.write('a')
        self.write('b')
        self.host.good('-c', '-f', 'x', '-s', '/a/b/', '--exclude', 'b',
                       '-C', self.lab.tree, 'a', 'b')
        self.assertEqual(self.members('x'), ['b'])
        self.assertEqual(self.members('x', '-s', '/b/c/', 'b'), ['c'])

    def test_a_bad_rule_is_one_line(self):
        result = self.host.run('-c', '-f', 'x', '-s', r'/\(/b/', '.')
        self.assertEqual(result.status, 1)
        self.assertRegex(result.err.splitlines()[0],
                         r'^tarsnap: -s: /\\\(/b/: ')
        self.assertFalse(os.path.exists(self.host.cache))

    def test_renamed_runs_do_not_spoil_the_memo(self):
        for number in range(30):
            self.write('d/%02d' % number, b'%d' % number)
        with lab.fine():
            self.store('one')
            self.host.create('two', '.')
            self.host.good('-c', '-f', 'swapped', '-s', ',/00,/T,', '-s',
                           ',/01,/00,', '-s', ',/T,/01,', '-C',
                           self.lab.tree, '.')
            where = self.host.extract('swapped')
            with open(os.path.join(where, 'd', '00'), 'rb') as file:
                self.assertEqual(file.read(), b'1')
            self.store('three')


if __name__ == '__main__':
    unittest.main()
