#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Backs a directory up, restores it and compares, by directory and network.

usage: contrib/demo.py [--s3] [DIR]

DIR is the standard library of the running Python unless given, without the
packages installed below it.  Each command is printed as a user would type it,
with the seconds it took.  Everything happens in a temporary directory, which
is removed at the end; the server is ended by its process id.  What is restored
is compared with DIR by a comparison of its own: kinds, modes, owners (as
root), times, targets, hard links, extended attributes and content.  Exit
status 0 if nothing differs.

With --s3 both stores are in a bucket of an S3 server that is started for it:
OpenStack's Swift, which is first installed into .venv-s3 if need be.
"""

import collections
import contextlib
import filecmp
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = {'tarsnap': ['tarsnap.py'], 'tarsnapd': ['tarsnapd.py'],
            'tarsnap-keygen': ['keygen.py', 'keygen'],
            'tarsnap-keymgmt': ['keygen.py', 'keymgmt']}
SHOWN = 12              # lines of output, and differences, that are printed
USER, PASSWORD = 'demo@example.org', 'correct horse battery staple'


class Failed(Exception):
    """The demo cannot go on; str() says why."""


def argv(words):
    """What is run for a command line of one of our programs."""
    script, *more = PROGRAMS[words[0]]
    return [sys.executable, os.path.join(ROOT, script), *more, *words[1:]]


def size_of(path, without=()):
    """Bytes in the files below `path`, links counted once."""
    seen = {}
    for top, folders, files in os.walk(path):
        if top == path:
            folders[:] = set(folders) - set(without)
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                st = os.lstat(os.path.join(top, name))
                seen[st.st_dev, st.st_ino] = st.st_size
    return sum(seen.values())


class Demo:
    """Runs commands in a temporary directory and prints what happens."""

    def __init__(self, source, temp, without=(), bucket=''):
        self.bucket = bucket        # s3://NAME, or stores are directories
        self.source = source        # what is backed up, absolute
        self.without = without      # names in it that are left out
        self.temp = temp            # everything else
        self.partial = False        # some of the source cannot be read
        self.begun = time.time()

    def run(self, *words, give='', tolerate=(), show=SHOWN, count=None):
        """Run one command; its output lines.

        `give` goes to its standard input; exit statuses other than 0 and
        those in `tolerate` end the demo.  With `count` the lines are not
        shown but counted, as `count`.
        """
        typed = shlex.join(words)
        print('$ ' + (('echo %s | ' % shlex.quote(give)) if give else '')
              + typed, flush=True)
        begun = time.monotonic()
        done = subprocess.run(argv(words), cwd=self.temp, input=give,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              encoding='utf-8', errors='surrogateescape')
        seconds = time.monotonic() - begun
        lines = done.stdout.splitlines()
        ok = done.returncode == 0 or done.returncode in tolerate
        if count and ok:
            print('  %d %s' % (len(lines), count))
        else:
            for line in lines[:show]:
                print('  ' + ascii_only(line))
            if len(lines) > show:
                print('  ... %d lines more' % (len(lines) - show))
        print('  [%.2f s]' % seconds, flush=True)
        if not ok:
            raise Failed('exit status %d from: %s' % (done.returncode, typed))
        if done.returncode:
            self.partial = True
            print('  (exit status %d: stored, but some of it could not be '
                  'read)' % done.returncode)
        return lines

    def say(self, text):
        print('\n--- ' + text, flush=True)

    def backup(self, name, *options):
        """One backup of the source, from above it."""
        above, last = os.path.split(self.source)
        last = last or '.'
        for left_out in self.without:
            options += ('--exclude', '%s/%s' % (last, left_out))
        return self.run('tarsnap', *options, '--print-stats', '-c', '-f', name,
                        '-C', above, last, tolerate=(2,))

    def restore_and_compare(self, name, *options):
        """Extract an archive and hold it against the source."""
        out = os.path.join(self.temp, 'restored')
        os.mkdir(out)
        self.run('tarsnap', *options, '-x', '-p', '-f', name, '-C',
                 'restored')
        last = os.path.basename(self.source)
        compare = Comparison(self.source, os.path.join(out, last),
                             self.begun, os.geteuid() == 0, self.without)
        compare.run()
        compare.report()
        remove_tree(out)
        if compare.differences:
            raise Failed('what was restored is not what was backed up')

    def init(self, name):
        """Make a server directory; the server's fingerprint."""
        options = ('--store', '%s/%s' % (self.bucket, name)
                   ) if self.bucket else ()
        return self.run('tarsnapd', 'init', name, *options)[-1].strip()

    def stored(self):
        """Say how much the first store has."""
        if self.bucket:
            self.run('tarsnapd', 'stats', 'store')
        else:
            print('  the store has %s bytes' % commas(size_of(
                os.path.join(self.temp, 'store', 'store'))))

    def directory(self):
        """The store is a directory; no server runs."""
        options = ('--keyfile', 'my.key', '--cachedir', 'cache')
        self.say('One machine, a directory as store' + (
            ', which keeps all in a bucket' if self.bucket else ''))
        if self.bucket:
            self.init('store')
        self.run('tarsnap-keygen', '--keyfile', 'my.key', '--machine', 'demo',
                 '--server', './store')
        self.say('The first backup')
        self.backup('first', *options)
        self.stored()
        self.run('tarsnap', *options, '--list-archives', '-v')
        self.run('tarsnap', *options, '-t', '-f', 'first', count='entries')
        self.say('Once more, with nothing changed')
        self.backup('second', *options)
        self.stored()
        self.say('Restore and compare')
        self.restore_and_compare('second', *options)
        self.say('Statistics, and a deletion')
        self.run('tarsnap', *options, '--print-stats', '-f', 'first')
        self.run('tarsnap', *options, '-d', '-f', 'first')
        self.run('tarsnap', *options, '--list-archives')

    def network(self):
        """The same through a server of its own."""
        self.say('A server, and a machine that may only reach it by network')
        fingerprint = self.init('server')
        self.run('tarsnapd', 'user', 'server', 'add', USER, give=PASSWORD)
        with self.server() as port:
            options = ('--keyfile', 'net.key', '--cachedir', 'netcache')
            self.run('tarsnap-keygen', '--keyfile', 'net.key', '--machine',
                     'demo', '--server', '127.0.0.1:%d' % port, '--user',
                     USER, '--fingerprint', fingerprint, give=PASSWORD)
            self.run('tarsnap-keymgmt', '--outkeyfile', 'write.key', '-w',
                     'net.key')
            self.run('tarsnap-keymgmt', '--print-key-permissions',
                     'write.key')
            self.say('A backup with a key that can only write')
            self.backup('first', '--keyfile', 'write.key', '--cachedir',
                        'netcache')
            self.say('Restore and compare, with the full key')
            self.restore_and_compare('first', *options)

    @contextlib.contextmanager
    def server(self):
        """A running server; gives its port, and ends it."""
        words = ('tarsnapd', 'serve', 'server', '--listen', '127.0.0.1:0')
        print('$ %s &' % shlex.join(words), flush=True)
        process = subprocess.Popen(argv(words), cwd=self.temp,
                                   stdin=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try:
            line = process.stderr.readline().rstrip()
            print('  ' + line)
            port = re.search(r':(\d+)$', line)
            if not port:
                raise Failed('the server did not start')
            yield int(port[1])
            print('$ kill %d' % process.pid)
            process.terminate()
            status = process.wait(60)
            print('  the server ended with status %d' % status)
            if status:
                raise Failed('the server did not end in good order')
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stderr.close()


class Comparison:
    """Two trees, entry by entry."""

    def __init__(self, source, copy, begun, owners, without):
        self.source = os.fsencode(source)
        self.copy = os.fsencode(copy)
        self.begun = begun          # what changed after this may differ
        self.owners = owners
        self.without = {os.fsencode(name) for name in without}
        self.entries = 0
        self.differences = []       # (path, what)
        self.changed = []           # paths that changed during the demo
        self.unread = []            # that this user cannot read
        self.links = collections.defaultdict(set)

    def run(self):
        self.pair(b'')
        for there in self.links.values():
            if len(there) > 1:
                self.differences.append((b'', 'hard links came apart'))

    def pair(self, path):
        """Compare one entry and all below it."""
        a = os.path.join(self.source, path) if path else self.source
        b = os.path.join(self.copy, path) if path else self.copy
        st = os.lstat(a)
        if stat.S_ISSOCK(st.st_mode):
            return
        try:
            other = os.lstat(b)
        except FileNotFoundError:
            self.differ(path, st, 'is missing', not self.readable(a, st))
            return
        self.entries += 1
        for what in self.compare(a, b, st, other):
            self.differ(path, st, what)
        if stat.S_ISDIR(st.st_mode) and stat.S_ISDIR(other.st_mode):
            self.below(path, a, b, st)

    def below(self, path, a, b, st):
        try:
            names = set(os.listdir(a)) - (set() if path else self.without)
        except PermissionError:
            self.unread.append(path)
            return
        for name in sorted(set(os.listdir(b)) - names):
            self.differ(os.path.join(path, name), st, 'was not there')
        for name in sorted(names):
            try:
                self.pair(os.path.join(path, name))
            except FileNotFoundError:
                self.changed.append(os.path.join(path, name))

    def compare(self, a, b, st, other):
        """What differs between two entries, in words."""
        if stat.S_IFMT(st.st_mode) != stat.S_IFMT(other.st_mode):
            yield 'is of another kind'
            return
        link = stat.S_ISLNK(st.st_mode)
        if not link and st.st_mode != other.st_mode:
            yield 'mode %o is %o' % (st.st_mode, other.st_mode)
        if st.st_mtime_ns != other.st_mtime_ns:
            yield 'mtime differs by %.9f s' % (
                (other.st_mtime_ns - st.st_mtime_ns) / 1e9)
        if self.owners and (st.st_uid, st.st_gid) != (other.st_uid,
                                                      other.st_gid):
            yield 'owner %d:%d is %d:%d' % (st.st_uid, st.st_gid,
                                            other.st_uid, other.st_gid)
        if link and os.readlink(a) != os.readlink(b):
            yield 'target differs'
        if (stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)) \
                and st.st_rdev != other.st_rdev:
            yield 'device number differs'
        if xattrs(a) != xattrs(b):
            yield 'extended attributes differ'
        if stat.S_ISREG(st.st_mode):
            yield from self.content(a, b, st, other)

    def content(self, a, b, st, other):
        if st.st_size != other.st_size:
            yield 'size %d is %d' % (st.st_size, other.st_size)
            return
        if st.st_nlink > 1:
            self.links[st.st_dev, st.st_ino].add(other.st_ino)
        try:
            if not filecmp.cmp(a, b, shallow=False):
                yield 'content differs'
        except PermissionError:
            yield 'cannot be read to compare'
        filecmp.clear_cache()

    def readable(self, path, st):
        return stat.S_ISLNK(st.st_mode) or os.access(path, os.R_OK)

    def differ(self, path, st, what, unreadable=False):
        """Note a difference, told apart by whose fault it is."""
        if unreadable:
            self.unread.append(path)
        elif max(st.st_mtime, st.st_ctime) >= self.begun - 2:
            self.changed.append(path)
        else:
            self.differences.append((path, what))

    def report(self):
        for path, what in self.differences[:SHOWN]:
            print('  %s: %s' % (ascii_only(os.fsdecode(path)) or '.', what))
        more = len(self.differences) - SHOWN
        if more > 0:
            print('  ... %d differences more' % more)
        if self.unread:
            print('  %d entries cannot be read by this user and were left '
                  'out' % len(self.unread))
        if self.changed:
            print('  %d entries changed while the demo ran' % len(
                set(self.changed)))
        if not self.differences:
            print('no difference in %d entries' % self.entries)


def xattrs(path):
    """Extended attributes that a user can see and set."""
    if not hasattr(os, 'listxattr'):
        return {}
    try:
        return {name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if name.startswith('user.') or name.startswith(
                    'system.posix_acl')}
    except OSError:
        return {}


def ascii_only(text):
    """`text` without what a terminal would take for a command."""
    return ''.join(c if c.isprintable() else '?' for c in
                   text.expandtabs().encode('utf-8', 'replace').decode())


def commas(number):
    return format(number, ',')


def remove_tree(path):
    """Remove a restored tree, directories nobody may write to included."""
    for top, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(top, 0o700)
    shutil.rmtree(path)


@contextlib.contextmanager
def bucket(wanted):
    """The URL of a bucket to use if `wanted`, else ''."""
    if not wanted:
        yield ''
        return
    sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
    import s3peers
    import tarsnapd
    print('Starting OpenStack Swift', flush=True)
    with s3peers.Swift() as swift:
        os.environ.update(swift.environment())
        for name, value in swift.environment().items():
            print('$ export %s=%s' % (name, value))
        tarsnapd.Bucket('demo', {}).request('create', '', 'PUT')
        yield 's3://demo'


def main():
    words = sys.argv[1:]
    s3 = words[:1] == ['--s3']
    words = words[s3:]
    if words == ['--help']:
        print(__doc__)
        return 0
    if len(words) > 1 or words[:1] and words[0].startswith('-'):
        print('demo: one directory, please; see --help', file=sys.stderr)
        return 1
    source = os.path.realpath(words[0] if words else
                              os.path.dirname(os.__file__))
    if not os.path.isdir(source):
        print('demo: %s: no such directory' % source, file=sys.stderr)
        return 1
    without = () if words else ('site-packages', 'dist-packages')
    temp = tempfile.mkdtemp(prefix='tarsnap-demo-')
    print('Backing up %s: %s bytes\n$ cd %s' % (
        source, commas(size_of(source, without)), temp))
    begun = time.monotonic()
    try:
        with bucket(s3) as url:
            demo = Demo(source, temp, without, url)
            demo.directory()
            demo.network()
    except (Failed, subprocess.TimeoutExpired) as e:
        sys.stdout.flush()
        print('demo: %s' % e, file=sys.stderr)
        return 1
    finally:
        remove_tree(temp)
    if demo.partial:
        print('\nSome of %s cannot be read by this user; all else is well.'
              % source)
    print('\nDone in %.0f seconds; %s is removed.' % (
        time.monotonic() - begun, temp))
    return 0


if __name__ == '__main__':
    sys.exit(main())
