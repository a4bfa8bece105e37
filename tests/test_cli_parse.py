# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How a command line is split, which option is for which mode, and what the
values look like.

Each row of a table is one rule, named in the subTest.  Rules of pure parsing
are put to the Parser; what shows outside, to the program.
"""

import contextlib
import io
import os
import shlex
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import tarsnap                                              # noqa: E402
import world                                                # noqa: E402

MODES = {'c': '-c', 'd': '-d', 't': '-t', 'x': '-x', 'r': '-r',
         'a': '--list-archives', 's': '--print-stats', 'R': '--recover',
         'f': '--fsck', 'p': '--fsck-prune', 'i': '--initialize-cachedir',
         'n': '--nuke', 'v': '--verify-config'}


def parse(line):
    """(Settings, what was said on stderr) of a line as a shell has it."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        words = shlex.split(line) if isinstance(line, str) else line
        return tarsnap.Parser(words).parse(), said.getvalue()


def run(*words, stdin=subprocess.DEVNULL, **environment):
    """Run the program where it finds no configuration file."""
    return subprocess.run(
        [sys.executable, world.Programs.path('tarsnap'), *words],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict({'PATH': os.environ['PATH'], 'LANG': 'C.UTF-8'},
                 **environment))


# (rule, command line, fields of Settings)
SPLIT = [
    ('1 old-style letters', 'cf NAME DIR',
     {'letter': 'c', 'names': [b'NAME'], 'items': [('path', b'DIR')]}),
    ('1 extract', 'xpf NAME',
     {'letter': 'x', 'names': [b'NAME'],
      'permissions': 'preserve-permissions'}),
    ('1 arguments in the order of the letters', 'cfC NAME DIR x',
     {'names': [b'NAME'], 'items': [('cd', b'DIR'), ('path', b'x')]}),
    ('1 arguments in the other order', 'cCf DIR NAME x',
     {'names': [b'NAME'], 'items': [('cd', b'DIR'), ('path', b'x')]}),
    ('1 options may follow', 'tvf NAME --iso-dates -v x',
     {'verbose': 2, 'iso_dates': True, 'items': [('path', b'x')]}),
    ('2 bundled, argument attached', '-cvfNAME a',
     {'letter': 'c', 'verbose': 1, 'names': [b'NAME'],
      'items': [('path', b'a')]}),
    ('2 attached alone', '-fNAME -c a',
     {'letter': 'c', 'names': [b'NAME']}),
    ('2 attached directory', '-c -f N -C/ a',
     {'items': [('cd', b'/'), ('path', b'a')]}),
    ('2 next word', '-xvf NAME', {'verbose': 1, 'names': [b'NAME']}),
    ('2 rest of a bundle that looks like options', '-tfv',
     {'names': [b'v'], 'verbose': 0}),
    ('2 an argument that looks like an option', '-c -f -x a',
     {'letter': 'c', 'names': [b'-x']}),
    ('3 blank', '-c --file NAME a', {'names': [b'NAME']}),
    ('3 equals sign', '-c --file=NAME a', {'names': [b'NAME']}),
    ('3 only the first equals sign', '-c --file=A=B a', {'names': [b'A=B']}),
    ('3 empty argument', '-d --file= -f b', {'names': [b'', b'b']}),
    ('4 --key is --keyfile', '--key F -d -f a', {'keyfile': 'F'}),
    ('4 prefix with an argument', '--keyf=F -d -f a', {'keyfile': 'F'}),
    ('4 prefix of a mode', '--list-a', {'letter': 'a'}),
    ('4 prefix of --no-', '-t -f a --no-qui', {'quiet': False}),
    ('4 exact wins over longer', '-c -f a --newer 2020-01-01 b',
     {'letter': 'c'}),
    ('4 exact wins: --null', '-c -f a --null b', {'null_input': True}),
    ('4 exact wins: --list', '--list -f a', {'letter': 't'}),
    ('5 -W name=arg', '-c -W file=NAME a', {'names': [b'NAME']}),
    ('5 -W attached', '-c -Wfile=NAME a', {'names': [b'NAME']}),
    ('5 -W of a flag', '-c -W quiet -f NAME a', {'quiet': True}),
    ('5 -W prefix', '-W key=F -d -f a', {'keyfile': 'F'}),
    ('5 -W in old-style letters', 'cWf verb NAME a',
     {'verbose': 1, 'names': [b'NAME']}),
    ('6 -- ends options', '-c -f N -- -v',
     {'items': [('path', b'-v')], 'verbose': 0}),
    ('6 a second -- is an operand', '-x -f N -- -- a',
     {'items': [('path', b'--'), ('path', b'a')]}),
    ('7 stops at the first operand', '-x -f N a -v',
     {'items': [('path', b'a'), ('path', b'-v')], 'verbose': 0}),
    ('7 -C among operands of -c', '-c -f N a -C d b -Ce c',
     {'items': [('path', b'a'), ('cd', b'd'), ('path', b'b'),
                ('cd', b'e'), ('path', b'c')]}),
    ('7 -C among operands after --', '-c -f N -- a -C d b',
     {'items': [('path', b'a'), ('cd', b'd'), ('path', b'b')]}),
    ('7 no -C among operands of -x', '-x -f N a -C d',
     {'items': [('path', b'a'), ('path', b'-C'), ('path', b'd')]}),
    ('7 - is an operand', '-c -f N - -v',
     {'items': [('path', b'-'), ('path', b'-v')]}),
    ('9 mode last', '-v --list-archives', {'letter': 'a', 'verbose': 1}),
    ('9 mode after --configfile', '--configfile F -v -c -f N a',
     {'letter': 'c', 'configs': ['F']}),
    ('9 --print-stats -d', '--print-stats -d -f A',
     {'letter': 'd', 'print_stats': True}),
    ('9 wrapper of c4rlo', '-L --exclude x -cf N D',
     {'letter': 'c', 'follow': 'dereference', 'exclude': [b'x']}),
    ('10 the same mode twice', '-c --create -f N a', {'letter': 'c'}),
    ('11 -h alone', '-h', {'help': True}),
    ('11 -h and a mode', '-h -cf N a',
     {'help': False, 'follow': 'dereference'}),
    ('11 -h in a bundle', '-chf N a',
     {'help': False, 'follow': 'dereference'}),
    ('15 --exclude repeats', '-c --exclude a --exclude b -f N x',
     {'exclude': [b'a', b'b']}),
    ('15 --include repeats', '-t --include a --include b -f N',
     {'include': [b'a', b'b']}),
    ('15 immediate options repeat', '-c -n -n -P -P -vv -v -f N x',
     {'norecurse': True, 'verbose': 3}),
    ('16 --print-stats then --no-', '--print-stats --no-print-stats -d -f A',
     {'letter': 'd', 'print_stats': True}),
    ('16 --no- then --print-stats', '--no-print-stats --print-stats -d -f A',
     {'letter': 'd', 'print_stats': True}),
    ('16 as a mode', '--no-print-stats --print-stats --no-print-stats',
     {'letter': 's', 'print_stats': True}),
    ('16 --no-print-stats alone', '--no-print-stats -c -f N x',
     {'print_stats': False}),
    ('-H -L: last wins', '-c -H -L -f N x', {'follow': 'dereference'}),
    ('-L -H: last wins', '-c -L -H -f N x', {'follow': 'follow-operands'}),
    ('-h -H: last wins', '-c -h -H -f N x', {'follow': 'follow-operands'}),
    ('--passphrase-stdin', '--passphrase-stdin -t -f N',
     {'passphrase': 'dev:stdin-once'}),
    ('-T - that is not the last', '-c -f N -T - -T list @-',
     {'files_from': 'list'}),
    ('-T - twice', '-t -f N -T - -I -', {'files_from': '-'}),
    ('@- twice', '-c -f N @- @-', {'letter': 'c'}),
    ('-B has no effect', '-B --read-full-blocks -t -f N', {'letter': 't'}),
    ('--debug-network-stats has no effect', '--debug-network-stats -t -f N',
     {'letter': 't'}),
    ('--dump-config alone', '--dump-config', {'letter': 'v'}),
    ('--dump-config in a mode', '--dump-config -t -f N', {'letter': 't'}),
]

# (rule, command line, what the one line on stderr says, usage follows)
REFUSED = [
    ('4 ambiguous', '-c --no-s', 'Ambiguous option: --no-s ', True),
    ('7 -C at the end of operands', '-c -f N a -C', '-C needs', True),
    ('10 two modes', '-c -f N --list-archives', '-c and --list-arch', True),
    ('10 no mode', '-v', 'Must specify one of ', True),
    ('10 no mode, --no-print-stats', '--no-print-stats', 'Must specify',
     True),
    ('12 unknown long', '--bogus -t', '--bogus', True),
    ('12 unknown letter', '-tZ', '-Z', True),
    ('12 unknown old-style letter', 'tZ', 'Z', True),
    ('12 missing argument', '-c -f', '-f needs', True),
    ('12 missing long argument', '-c --file', '--file needs', True),
    ('12 missing -W', '-c -W', '-W needs', True),
    ('12 missing old-style argument', 'cf', '-f needs', True),
    ('12 argument to a flag', '-c --quiet=1', '--quiet takes no', True),
    ('12 argument to a mode', '--fsck=1', '--fsck takes no', True),
    ('12 argument to --no-', '--no-quiet=1 -t', '--no-quiet takes no', True),
    ('12 argument to --passphrase-stdin', '--passphrase-stdin=1 -t',
     '--passphrase-stdin takes no', True),
    ('14 delayed option in the wrong mode', '-d -f A --checkpoint-bytes 1G',
     '--checkpoint-bytes is not permitted in mode -d', False),
    ('15 repeated flag', '--quiet -t -f N --quiet', '--quiet is given twice',
     True),
    ('15 --x with --no-x', '--quiet --no-quiet -t -f N',
     '--quiet and --no-quiet', True),
    ('15 repeated value', '--keyfile a --keyfile a -t -f N',
     '--keyfile is given twice', True),
    ('15 --passphrase twice', '--passphrase-stdin --passphrase env:A -t',
     '--passphrase-stdin and --passphrase ', True),
    ('--archive-names once', '-d --archive-names a --archive-names b',
     '--archive-names is given twice', True),
    ('--csv-file once', '--print-stats --csv-file a --csv-file b',
     '--csv-file is given twice', True),
    ('one dry-run flag', '-c --dry-run --dry-run x', '--dry-run is', True),
    ('one dry-run flag of two', '-c --dry-run --dry-run-metadata x',
     '--dry-run and --dry-run-metadata', True),
    ('--lowmem excludes --verylowmem', '-c --lowmem --verylowmem -f N x',
     '--lowmem and --verylowmem', True),
    ('--normalmem excludes --lowmem', '-c --normalmem --lowmem -f N x',
     '--normalmem and --lowmem', True),
    ('-T and --archive-names of standard input', '-t -T - --archive-names -',
     '-T - and --archive-names - both read standard input', False),
    ('in the other order', '-t --archive-names - --files-from -',
     '--archive-names - and --files-from - both read standard input', False),
    ('-T and -X of standard input', '-t -f N -T - -X -',
     '-T - and -X - both read standard input', False),
    ('-T and @- of standard input', '-c -f N -T - @-',
     '-T - and @- both read standard input', False),
    ('no --no-checkpoint-bytes', '-c --no-checkpoint-bytes -f N x',
     'Unknown option: --no-checkpoint', True),
    ('no --no-maxbw-rate', '-c --no-maxbw-rate=1 -f N x',
     'Ambiguous option: --no-maxbw-rate', True),
    ('-C of nothing', "-c -f N -C '' a", '-C: ', False),
    ('-C of nothing among operands', "-c -f N a -C '' a", '-C: ', False),
]

# Options of the contract: words, modes in which they have a meaning, and
# whether they are refused elsewhere: ! is yes, + is yes but as --no-NAME.
ENFORCED = """
-f A: cdtxras !                     --archive-names /dev/null: cdtxras !
--keyfile F:                        --cachedir D:
--configfile F:                     --no-default-config:
-C D: ctx !                         --cd D: ctx !
-v:                                 --quiet:            --no-quiet:
--exclude P: ctx !                  --include P: ctx !
-X /dev/null: ctx                   --exclude-from /dev/null: ctx
-T L: ctx !                         --files-from L: ctx !       -I L: ctx !
--null: ctx !                       --null-input: ctx !
--null-output: aestx !
--no-config-exclude:                --no-config-include:
-n: c !                             --norecurse: c !
--one-file-system: c !              -H: c !             -L: c !
-h: c !                             --dereference: c !
--nodump: c !                       --no-nodump: c !
--noatime: c !                      --no-noatime: c !
--store-atime: c !                  --no-store-atime: c !
--snaptime /: c !                   --no-snaptime: c !
--insane-filesystems: c             --no-insane-filesystems: c
-l: c !                             --check-links: c !
--newer 2020-01-01: ctx !           --newer-ctime 2020-01-01: ctx !
--newer-mtime 2020-01-01: ctx !
--newer-than /: ctx !               --newer-mtime-than /: ctx !
-P: ctx !                           --absolute-paths: ctx !
-s /a/b/: ctx                       --creationtime 1: c
--strip-components 0: tx
--dry-run: ce !                     --dry-run-metadata: c !
--print-stats: cde                  --no-print-stats: cde
--humanize-numbers:                 --no-humanize-numbers:
--csv-file F: cdes
--totals: c !                       --no-totals: c !
--progress-bytes 1k: cx !           --no-progress-bytes: cx !
--checkpoint-bytes 1M: c !
--maxbw 1G: c !                     --no-maxbw: c !
--maxbw-rate 8000:
--maxbw-rate-up 8000:               --no-maxbw-rate-up:
--maxbw-rate-down 8000:             --no-maxbw-rate-down:
--aggressive-networking: c !        --no-aggressive-networking:
--disk-pause 10: c !                --no-disk-pause: c !
--lowmem: c !                       --verylowmem: c !   --normalmem: c !
--retry-forever:                    --no-retry-forever:
--noisy-warnings:                   --passphrase env:X:
--passphrase-stdin:
--force-resources:                  --no-force-resources:
--hashes:                           --iso-dates:        --no-iso-dates:
--numeric-owner:                    -p:                 -o: x !
--same-owner:                       --no-same-owner: x !
--no-same-permissions:
-k:                                 --keep-newer-files:
--resume-extract:
-m:                                 -O: tx !            --to-stdout: tx !
-q: tx !                            --fast-read: tx !
-S:                                 -U: x !             --unlink: x !
-w: cx                              --chroot:           --keep-going:
--dump-config:                      --debug-network-stats:
-B:                                 --lock-wait 1:
"""

ALIASES = {
    '--absolute-paths': '-P', '--insecure': '-P', '--keep-old-files': '-k',
    '--cd': '-C', '--directory': '-C', '--list': '-t',
    '--confirmation': '-w', '--interactive': '-w',
    '--modification-time': '-m', '--create': '-c',
    '--newer-ctime': '--newer', '--dereference': '-L',
    '--newer-ctime-than': '--newer-than', '--exclude-from': '-X',
    '--norecurse': '-n', '--no-recursion': '-n', '--extract': '-x',
    '--preserve-permissions': '-p', '--same-permissions': '-p',
    '--fast-read': '-q', '--read-full-blocks': '-B', '--file': '-f',
    '--to-stdout': '-O', '--files-from': '-T', '--unlink': '-U',
    '--unlink-first': '-U', '-I': '-T', '--verbose': '-v',
    '-l': '--check-links', '--null': '--null-input'}

# The letters of rule 17; `:` follows one that takes an argument.
LETTERS = 'B C: c d f: H h I: k L l m n O o P p q r S s: T: t U v W: w X: x'

GUI = '--no-default-config --keyfile K --cachedir D '
GO = '--quiet --no-print-stats --keyfile K --cachedir D '

# Contract 6: command lines of the programs around it, by mode.
WRAPPERS = [
    ('acts', 'c', '-c -f h-daily-2026-01-01_00:00:00 -C / --one-file-system '
     '--humanize-numbers etc'),
    ('acts, monthly', 'c', '-c -f h-monthly --one-file-system @@h-daily'),
    ('tarsnapper', 'c', '-v --keyfile k -c --exclude a --exclude b -f t s'),
    ('tarsnapper', 'd', '--configfile F -d -f A -f B'),
    ('GUI, list', 'a', GUI + '--list-archives -vv'),
    ('GUI, limits', 'a', GUI + '--maxbw-rate-down 9000 --maxbw-rate-up 9000 '
     '--list-archives -vv'),
    ('GUI, statistics', 's', GUI + '--print-stats --no-humanize-numbers '
     '-f A'),
    ('GUI, contents', 't', GUI + '-P -tv -f A'),
    ('GUI, create', 'c', GUI + '--aggressive-networking --dry-run --nodump '
     '-P --one-file-system -L --creationtime 1 --quiet --print-stats '
     '--no-humanize-numbers -c -f N --exclude E a b'),
    ('GUI, delete', 'd', GUI + '--print-stats -d -f A'),
    ('GUI, restore', 'x', GUI + '-x -P -C D -k --keep-newer-files -p -T - '
     '-f A'),
    ('GUI, tar', 'r', GUI + '-r -f A'),
    ('GUI, nuke', 'n', GUI + '--nuke'),
    ('creachadair, list', 'a', GO + '--list-archives -v'),
    ('creachadair, create', 'c', GO + '-c -f N -C D -H --store-atime -P '
     '--creationtime 1 --dry-run -s /a/b/ --exclude E -- a b'),
    ('creachadair, extract', 'x', GO + '-x -f N -C D -p -o --fast-read '
     '--resume-extract --exclude E -- a'),
    ('creachadair, entries', 't', GO + '-v --iso-dates --numeric-owner -t '
     '-f N'),
    ('creachadair, sizes', 's', GO + '--print-stats --no-humanize-numbers '
     '-f A -f B'),
    ('redsnapper', 't', '-tvf A --keyfile K dir'),
    ('redsnapper, extract', 'x', '-xvf A --cachedir D a b'),
    ('Tarsnap-generations', 'c', '-c -f N --one-file-system -C / d'),
    ('tarsnap_pruner', 'd', '-d --keyfile K --cachedir D -f N'),
    ('zabbix', 's', '--print-stats --csv-file F'),
    ('c4rlo', 'd', '-df N'), ('c4rlo', 'c', '-cf NEW @@OLD'),
    ('deuza', 'v', '--verify-config'),
    ('deuza', 'a', '--no-aggressive-networking --list-archives'),
    ('deuza', 's', '--no-aggressive-networking --print-stats'),
    ('deuza', 't', '-tv --iso-dates -f A'),
    ('deuza', 'c', '--quiet --no-print-stats -c --exclude=P -f N x'),
    ('NixOS', 'c', '--configfile F -c -f N -v -H -L d'),
    ('NixOS', 'x', '--configfile F -x -f N -v'),
    ('stathat', 'c', '-fNAME -c a'), ('stathat', 'd', '-d -fNAME'),
    ('puppet', 'a', '--key F --list-archives'),
    ('docker', 'd', '-d --archive-names F --print-stats --humanize-numbers'),
    ('acts, FAQ', 'c', '--dry-run --quiet --print-stats --humanize-numbers '
     '-C / -c d'),
    ('upstream 07', 'c', '-c --dry-run-metadata -v -C s --include . '
     '--include dir1 .'),
]

SIZE, RATE, INTEGER = 'size', 'rate', 'integer'
VALUES = [
    # option, text, value; None: refused
    (SIZE, '1000', 1000), (SIZE, '1k', 1000), (SIZE, '1 k', 1000),
    (SIZE, '1kB', 1000), (SIZE, '1 GB', 10 ** 9), (SIZE, '2M', 2 * 10 ** 6),
    (SIZE, '3T', 3 * 10 ** 12), (SIZE, '4P', 4 * 10 ** 15),
    (SIZE, '5E', 5 * 10 ** 18), (SIZE, '1000B', 1000), (SIZE, '1000 B', 1000),
    (SIZE, '1K', None), (SIZE, '1KiB', None), (SIZE, '1MiB', None),
    (SIZE, '1  k', None), (SIZE, '1.5k', None), (SIZE, '-1k', None),
    (SIZE, '', None), (SIZE, 'k', None), (SIZE, '1k ', None),
    (SIZE, '999', None), (SIZE, '1 kb', None), (SIZE, '1Z', None),
    (RATE, '8000', 8000), (RATE, '1e6', 1e6), (RATE, '1e9', 1e9),
    (RATE, '12345.5', 12345.5), (RATE, '+9e3', 9000), (RATE, '100k', None),
    (RATE, '7999', None), (RATE, '1e10', None), (RATE, 'nan', None),
    (RATE, 'inf', None), (RATE, '', None), (RATE, '1_000_000', None),
    (RATE, '-9000', None),
    (INTEGER, '10', 10), (INTEGER, '0x10', 16), (INTEGER, '010', 8),
    (INTEGER, '0', 0), (INTEGER, '10ms', 10), (INTEGER, '1000', 1000),
    (INTEGER, '1001', None), (INTEGER, '-1', None), (INTEGER, 'no', None),
    (INTEGER, '', None),
]
OPTION_OF = {SIZE: 'progress-bytes', RATE: 'maxbw-rate-up',
             INTEGER: 'disk-pause'}


class Split(unittest.TestCase):
    """Contract 1.1, and how options meet in 1.3."""

    def test_rules(self):
        for rule, line, fields in SPLIT:
            with self.subTest(rule, line=line):
                opt, said = parse(line)
                self.assertEqual(said, '')
                self.assertEqual({name: getattr(opt, name)
                                  for name in fields}, fields)

    def test_wrappers(self):
        for name, letter, line in WRAPPERS:
            with self.subTest(name, line=line):
                opt, said = parse(line)
                self.assertEqual((opt.letter, said), (letter, ''))
                opt.files_from = None           # would be read
                opt.finish()

    def test_refused(self):
        for rule, line, says, usage in REFUSED:
            with self.subTest(rule, line=line):
                with self.assertRaises(tarsnap.UserError) as caught:
                    parse(line)
                self.assertIn(says, str(caught.exception))
                self.assertEqual(isinstance(caught.exception, tarsnap.Usage),
                                 usage)

    def test_8_operand_that_looks_like_an_option(self):
        for line, warned in (('-c -f N a --verbose', True),
                             ('-c -f N a -v', False),
                             ('-x -f N a --verbose', False)):
            with self.subTest(line):
                opt, said = parse(line)
                self.assertEqual(opt.items[1][1], shlex.split(line)[-1]
                                 .encode())
                self.assertEqual('--verbose' in said, warned)

    def test_13_delayed_options_wait_for_the_mode(self):
        # An unknown mode is told before a wrong value.
        with self.assertRaisesRegex(tarsnap.Usage, 'Must specify'):
            parse('--checkpoint-bytes nothing')
        with self.assertRaisesRegex(tarsnap.UserError, 'not permitted'):
            parse('--checkpoint-bytes nothing -d -f A')

    def test_17_letters(self):
        letters = tarsnap.Parser([]).letters
        for word in LETTERS.split():
            with self.subTest(word):
                row = letters[word[0]]
                argument = isinstance(row, tarsnap.Option) and row.arg
                self.assertEqual(bool(argument), word.endswith(':'))
        self.assertEqual(set(letters), {w[0] for w in LETTERS.split()})

    def test_aliases(self):
        parser = tarsnap.Parser([])

        def row(word):
            return parser.longs[word[2:]] if word.startswith('--') \
                else parser.letters[word[1:]]
        for alias, word in ALIASES.items():
            with self.subTest(alias):
                self.assertIs(row(alias), row(word))


class Enforced(unittest.TestCase):
    """Contract 1.3: what each mode accepts on the command line."""

    def rows(self):
        for line in ENFORCED.splitlines():
            for cell in line.split('  '):
                words, _, modes = cell.strip().rpartition(':')
                if words:
                    yield words, modes.strip()

    def test_every_mode(self):
        for words, modes in self.rows():
            modes, strict = modes.rstrip(' !'), modes.endswith('!')
            for letter, mode in MODES.items():
                with self.subTest(words, mode=mode):
                    try:
                        parse('%s %s' % (words, mode))
                        refused = False
                    except tarsnap.UserError as e:
                        self.assertIn('not permitted in mode %s' % mode,
                                      str(e))
                        refused = True
                    self.assertEqual(refused, strict and letter not in modes)

    def test_strip_components(self):
        # Only another number than 0 is refused, once the mode is checked.
        for number, code in (('0', 0), ('1', 1)):
            done = run('--no-default-config', '--verify-config',
                       '--strip-components', number)
            self.assertEqual((done.returncode, b'--strip' in done.stderr),
                             (code, bool(code)), done)


class Values(unittest.TestCase):
    """Contract 1.4."""

    def test_kinds(self):
        for kind, text, value in VALUES:
            name = OPTION_OF[kind]
            words = ['-c', '-f', 'N', '--%s=%s' % (name, text), 'x']
            with self.subTest(kind, text=text):
                if value is None:
                    with self.assertRaisesRegex(tarsnap.UserError,
                                                '^--%s: ' % name):
                        parse(words)
                else:
                    opt, _ = parse(words)
                    self.assertEqual(getattr(opt, name.replace('-', '_')),
                                     value)

    def test_bounds(self):
        for option, wrong, right in (
                ('checkpoint-bytes', '999999', '1000000'),
                ('progress-bytes', '999', '1000'),
                ('maxbw-rate', '7999', '8000'),
                ('maxbw-rate-down', '1000000001', '1000000000'),
                ('disk-pause', '1001', '1000'),
                ('creationtime', '0', '0x10'), ('creationtime', '-5', '1'),
                ('creationtime', '0x8000000000000000', '99999999999'),
                ('compression', '10', '9'), ('compression', '0', 'none')):
            with self.subTest(option, value=wrong):
                with self.assertRaisesRegex(tarsnap.UserError, option):
                    parse('-c --%s=%s -f N x' % (option, wrong))
                parse('-c --%s=%s -f N x' % (option, right))

    def test_no_takes_it_back(self):
        for option, value in (('maxbw', '1G'), ('progress-bytes', '1k'),
                              ('disk-pause', '1'), ('snaptime', '/'),
                              ('maxbw-rate-up', '8000')):
            with self.subTest(option):
                opt, _ = parse('-c --no-%s -f N x' % option)
                self.assertIsNone(getattr(opt, option.replace('-', '_')))
                with self.assertRaisesRegex(
                        tarsnap.Usage, '--no-%s and --%s' % (option, option)):
                    parse('-c --no-%s --%s=%s -f N x' % (
                        option, option, value))

    def test_names(self):
        # 1 to 1023 bytes of anything; checked before a key is asked for.
        for name, fine in (('', False), ('x' * 1023, True),
                           ('x' * 1024, False), ('\u20ac' * 342, False),
                           ('a b:c/d \u20ac', True), ('\n', True)):
            with self.subTest(name[:10]):
                done = run('--no-default-config', '-c', '-f', name, '.')
                self.assertEqual(done.returncode, 1)
                self.assertEqual(b'1 to 1023 bytes' in done.stderr, not fine)


class Observable(unittest.TestCase):
    """What a caller of the program sees of it."""

    def test_usage_error(self):
        done = run('--bogus')
        self.assertEqual((done.returncode, done.stdout), (1, b''))
        lines = done.stderr.decode().splitlines()
        self.assertEqual(lines[0], 'tarsnap: Unknown option: --bogus')
        self.assertRegex(lines[1], '^usage: tarsnap ')
        self.assertNotIn('Error exit', done.stderr.decode())

    def test_upstream_01(self):
        done = run('--no-default-config')
        self.assertEqual((done.returncode, done.stdout), (1, b''))
        self.assertTrue(done.stderr.startswith(
            b'tarsnap: Must specify one of '))

    def test_version(self):
        for words in (['--version'], ['-c', '--version'], ['--vers']):
            done = run(*words)
            self.assertEqual((done.returncode, done.stderr), (0, b''))
            self.assertRegex(done.stdout, rb'\Atarsnap \d+\.\d+\.\d+\n\Z')

    def test_help(self):
        for words in (['--help'], ['-h'], ['-hv']):
            done = run(*words)
            self.assertEqual((done.returncode, done.stderr), (0, b''))
            text = done.stdout.decode().splitlines()
            self.assertRegex(text[-1], r'^tarsnap \d+\.\d+\.\d+$')
            self.assertLessEqual(max(map(len, text)), 110)
            for name in tarsnap.Parser([]).longs:
                if name not in tarsnap.ALIASES:
                    self.assertIn(name.replace('no-', '', 1)
                                  if name.startswith('no-') else name,
                                  done.stdout.decode())

    def test_operand_warning_goes_to_stderr(self):
        done = run('--no-default-config', '-c', '--dry-run', os.devnull,
                   '--help')
        self.assertRegex(done.stderr.decode(), '(?m)^tarsnap: "--help"')

    def test_words_of_any_bytes(self):
        # As from cron: a locale that knows ASCII only, stdin shut, no HOME.
        for value in (b'--b\xff\xc3\xbcgus', b'--quiet=\xff', b'-\xff'):
            for locale in ('C', 'C.UTF-8', 'POSIX'):
                with self.subTest(value, locale=locale):
                    done = subprocess.run(
                        ['sh', '-c', 'exec "$@" <&-', 'sh', sys.executable,
                         world.Programs.path('tarsnap'), value],
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        env={'PATH': os.environ['PATH'], 'LC_ALL': locale,
                             'PYTHONCOERCECLOCALE': '0'})
                    self.assertEqual(done.returncode, 1)
                    self.assertNotIn(b'Traceback', done.stderr)
                    self.assertTrue(done.stderr.startswith(b'tarsnap: '))


if __name__ == '__main__':
    unittest.main()
