# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What lies beside the programs fits them: completions have every option and
no other, and the examples for cron and systemd really make backups.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest

import rawclient
import world

CONTRIB = os.path.join(world.ROOT, 'contrib')
sys.path.insert(0, CONTRIB)

import completions                                          # noqa: E402
import keygen                                               # noqa: E402
import tarsnap                                              # noqa: E402

# compopt says what it was asked for, as there is no line being edited.
DRIVER = r'''
. "$1"; shift
compopt() { printf 'compopt %s\n' "$2"; }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
_tarsnap "$1" "$word" "$before"
printf '%s\n' "${COMPREPLY[@]}"
'''


def read(name):
    with open(os.path.join(CONTRIB, name)) as file:
        return file.read()


class Completions(unittest.TestCase):

    def test_written_from_the_tables_of_now(self):
        found = completions.programs()
        for name, text in (('completion.bash', completions.bash(found)),
                           ('_tarsnap', completions.zsh(found))):
            self.assertEqual(read(name), text,
                             'run contrib/completions.py: %s' % name)

    def options(self):
        """program -> the options its own parser knows."""
        parser = tarsnap.Parser([])
        yield 'tarsnap', (['--' + name for name in parser.longs]
                          + ['-' + letter for letter in parser.letters])
        for program in ('keygen', 'keyregen', 'keymgmt', 'recrypt'):
            yield 'tarsnap-' + program, getattr(
                keygen, program.upper() + '_OPTIONS')

    def bash(self, *words):
        done = subprocess.run(
            ['bash', '--norc', '-c', DRIVER, 'bash',
             os.path.join(CONTRIB, 'completion.bash'), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout.split('\n')[:-1]

    def test_bash_has_all_options_and_no_other(self):
        for program, options in self.options():
            with self.subTest(program):
                self.assertEqual(sorted(self.bash(program, '-')),
                                 sorted(options))

    def test_zsh_has_all_options_and_no_other(self):
        text = read('_tarsnap')
        for program, options in self.options():
            with self.subTest(program):
                part = re.search(r'(?ms)^%s\)\n(.*?);;' % program, text)[1]
                found = re.findall(r"(?m)^ +'\*(-[\w-]+)", part)
                self.assertEqual(sorted(found), sorted(options))

    def test_bash(self):
        for words, wanted in (
                (['tarsnap', '--keyf'], ['--keyfile']),
                (['/usr/bin/tarsnap', '--keyf'], ['--keyfile']),
                (['tarsnap', '-c', '--list-'], ['--list-archives']),
                (['tarsnap', '--keyfile', 'x'], ['compopt default', '']),
                (['tarsnap', '--keyfile', '=', 'x'], ['compopt default', '']),
                (['tarsnap', '--keyfile', '='], ['compopt default', '']),
                (['tarsnap', '--cachedir', 'x'], ['compopt dirnames', '']),
                (['tarsnap', '-C', ''], ['compopt dirnames', '']),
                (['tarsnap', '-f', '-'], ['']),
                (['tarsnap', '--compression', 'n'], ['none']),
                (['tarsnap', '--passphrase', 'e'], ['env:']),
                (['tarsnap', '-c', 'x'], ['compopt default', '']),
                (['tarsnap-keymgmt', '--print-key-i'], ['--print-key-id']),
                (['tarsnap-recrypt', '--oldcachedir', ''],
                 ['compopt dirnames', '']),
                (['tarsnap-keygen', '--machine', ''], [''])):
            with self.subTest(words):
                self.assertEqual(self.bash(*words), wanted)

    def test_arguments_of_key_tools(self):
        # Each that names a file is in the table of completions.py.
        for program, table in completions.KEY_TOOLS.items():
            for option, kind in table.items():
                if kind in (keygen.ONCE, keygen.MANY) and re.search(
                        'file|dir|key$|key-id|permissions|passphrase$',
                        option):
                    self.assertIn(option, completions.KEY_ARGUMENTS)

    def test_syntax(self):
        # zsh where there is one; bash has run it above.
        if shutil.which('zsh'):
            subprocess.check_call(['zsh', '-n', os.path.join(CONTRIB,
                                                             '_tarsnap')])


class Nights(unittest.TestCase):
    """tarsnapd.crontab, run as cron would."""

    def test_crontab(self):
        srv = rawclient.server_directory(self)
        with open(os.path.join(srv, 'tarsnapd.conf'), 'a') as file:
            file.write('storage-price = 250\nmail-from = a@example.org\n'
                       'mail-sendmail = /bin/false\n')
        program = os.path.join(os.path.dirname(srv), 'tarsnapd')
        world.write(program, ('#!/bin/sh\nexec %s "$@"\n' % shlex.join(
            [sys.executable, world.Programs.path('tarsnapd')])).encode())
        os.chmod(program, 0o755)
        jobs = re.findall(r'(?m)^(?:[\d*/]+ ){5} *(.*)$',
                          read('tarsnapd.crontab'))
        self.assertEqual(len(jobs), 3)
        for job in jobs:
            done = subprocess.run(
                ['/bin/sh', '-c', job], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env={
                    'PATH': os.path.dirname(program) + ':/usr/bin:/bin',
                    'SRV': srv})
            self.assertEqual((done.returncode, done.stdout), (0, ''), job)


class Schedules(unittest.TestCase):
    """crontab.example and the units, run as their programs would."""

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'dir')
        w.keygen()
        os.mkdir(w.path('cache'), 0o700)
        world.write(w.path('a tree', 'file'), b'content')
        world.write(w.path('tarsnap.conf'), (
            'keyfile %s\ncachedir %s\nprint-stats\n'
            % (w.key, w.path('cache'))).encode())
        # The program as it is installed, with its configuration file.
        os.mkdir(w.path('bin'))
        world.write(w.path('bin', 'tarsnap'), (
            '#!/bin/sh\nexec %s --no-default-config --configfile %s "$@"\n'
            % (shlex.join([sys.executable, w.program('tarsnap')]),
               shlex.quote(w.path('tarsnap.conf')))).encode())
        os.chmod(w.path('bin', 'tarsnap'), 0o755)

    def shell(self, command):
        """Run a line in the surroundings that cron gives it."""
        w = self.world
        return w.run(['/bin/sh', '-c', command], env={
            'PATH': w.path('bin') + ':/usr/bin:/bin', 'SHELL': '/bin/sh',
            'HOME': '/', 'LOGNAME': 'root', 'TREES': '-C . a?tree'})

    def tearDown(self):
        for name in self.world.names():
            self.world.ok('-d', '-f', name)

    def test_crontab(self):
        jobs = []
        for line in read('crontab.example').splitlines():
            if line[:1].isdigit():
                fields = line.split(None, 5)
                self.assertRegex(' '.join(fields[:5]), r'^\d+ \d+ \* \* \*$')
                # A % that is not escaped would end the command.
                self.assertNotRegex(fields[5], r'(^|[^\\])%')
                jobs.append(fields[5].replace('\\%', '%'))
            elif line and line[0] != '#':
                self.assertRegex(line, r'^[A-Z]+=')
        self.assertEqual(len(jobs), 4)
        for job in jobs:
            done = self.shell(job)
            self.assertEqual((done.code, done.out + done.err), (0, ''), job)
        name, = self.world.names()
        self.assertRegex(name, r'^%s-\d{4}-\d\d-\d\d$'
                         % re.escape(os.uname().nodename))
        self.assertEqual(self.world.ok('-t', '-f', name).out,
                         'a tree/\na tree/file\n')

    def test_service(self):
        line = re.search('(?m)^ExecStart=(.*)$', read(
            'tarsnap-backup.service'))[1]
        self.assertNotRegex(line.replace('%%', '').replace('$$', ''), '[%$]')
        words = shlex.split(line.replace('%%', '%').replace('$$', '$'))
        self.assertEqual(words[:2], ['/bin/sh', '-c'])
        done = self.shell(words[2])
        self.assertEqual(done.code, 0, done)
        self.assertEqual(len(self.world.names()), 1)

    def test_units(self):
        # Where there is systemd.
        if shutil.which('systemd-analyze'):
            done = subprocess.run(
                ['systemd-analyze', 'verify', '--man=no'] + [
                    os.path.join(CONTRIB, 'tarsnap-backup.' + kind)
                    for kind in ('service', 'timer')],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, ''))


if __name__ == '__main__':
    unittest.main()
