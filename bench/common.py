# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What the benchmarks share: a place to work in, measuring, and the report.

A `Place` is a temporary directory with the programs installed as pip would,
compiled and behind small commands, a home of its own, and servers that end
with it.  `Place.measure` runs one command: seconds on the wall, CPU seconds of
it and its children, and their peak memory together: the larger of what the
system noted for the largest of them and of a sampled sum in which shared pages
count once.  A server's share, where one is watched, stands apart.

A `Report` keeps each single run under its labels, and makes of them the
medians, the least and the most, a table and a JSON document.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PASSWORD = b'password\n'
SAMPLE_SECONDS = 0.05       # between two looks at memory
TICKS = os.sysconf('SC_CLK_TCK')

LAUNCHER = '''\
import sys
sys.path[0] = %r
from %s import main
sys.exit(main())
'''

# A program that prints versions: imported here, the libraries would be in the
# way (see `warm`).
LIBRARIES = ('import cryptography, ssl, zlib; print('
             'cryptography.__version__, "with", ssl.OPENSSL_VERSION, "and '
             'zlib", zlib.ZLIB_RUNTIME_VERSION)')

##############################################################################
# Measuring
##############################################################################


def children(pid):
    """Process ids of `pid` and everything below it."""
    out = [pid]
    for at in out:
        try:
            for task in os.listdir('/proc/%d/task' % at):
                with open('/proc/%d/task/%s/children' % (at, task)) as file:
                    out += map(int, file.read().split())
        except OSError:
            pass
    return out


def memory(pid):
    """Bytes of memory of `pid` and its children, shared pages counted once;
    0 where the system does not tell.
    """
    total = 0
    for each in children(pid):
        try:
            with open('/proc/%d/smaps_rollup' % each) as file:
                total += sum(int(line.split()[1]) * 1024 for line in file
                             if line.startswith('Pss:'))
        except OSError:
            pass
    return total


def processor(pid):
    """CPU seconds that `pid` and its living children have used so far."""
    total = 0
    for each in children(pid):
        try:
            with open('/proc/%d/stat' % each) as file:
                words = file.read().rpartition(')')[2].split()
            total += sum(map(int, words[11:15]))    # utime .. cstime
        except OSError:
            pass
    return total / TICKS


class Sampler(threading.Thread):
    """Watches the memory of running processes."""

    def __init__(self, *pids):
        super().__init__()
        self.most = dict.fromkeys(pids, 0)      # process -> bytes
        self.done = threading.Event()
        self.start()

    def run(self):
        while True:
            for pid in self.most:
                self.most[pid] = max(self.most[pid], memory(pid))
            if self.done.wait(SAMPLE_SECONDS):
                return

    def end(self):
        """The most seen of each, bytes."""
        self.done.set()
        self.join()
        return self.most


def warm(tree):
    """Read a tree into the page cache; (files, bytes).  In small pieces, so
    that this process stays small: a child's peak memory begins with ours.
    """
    files = size = 0
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            files += 1
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            with open(path, 'rb', buffering=0) as file:
                while True:
                    got = len(file.read(65536))
                    size += got
                    if not got:
                        break
    return files, size


def size_of(path):
    """Bytes of all files below a directory, the sum of st_size."""
    return sum(os.lstat(os.path.join(folder, name)).st_size
               for folder, _, names in os.walk(path) for name in names)


##############################################################################
# The place
##############################################################################


def free_port():
    """A port of the loopback that nobody has at the moment."""
    with socket.create_server(('127.0.0.1', 0)) as sock:
        return sock.getsockname()[1]


class Place:
    """A temporary directory, its programs and its servers; use as `with`."""

    def __init__(self, parent=None):
        self.root = tempfile.mkdtemp(prefix='tarsnap-bench-', dir=parent)
        self.env = dict(os.environ, HOME=self.root)
        self.env.pop('LD_PRELOAD', None)
        self.servers = []               # Popen
        self.removed = 0                # things, so far
        for name in ('tarsnap', 'tarsnapd', 'keygen'):
            self.install(name)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def path(self, *names):
        return os.path.join(self.root, *names)

    def install(self, name):
        """A module and the command that runs it, as pip would."""
        library = self.path('lib')
        os.makedirs(library, exist_ok=True)
        module = os.path.join(library, name + '.py')
        shutil.copy(os.path.join(HERE, name + '.py'), module)
        # By another process: it needs 50 MB (see `warm`).
        subprocess.run([sys.executable, '-m', 'py_compile', module],
                       check=True)
        with open(self.path('run-%s.py' % name), 'w') as file:
            file.write(LAUNCHER % (library, name))

    def script(self, name, *words):
        """The command line of one of ours."""
        return [sys.executable, self.path('run-%s.py' % name), *words]

    def remove(self, *names):
        """Take things out of the way; they are deleted at the end only.

        For minutes after many inodes were freed, ext4 looks for others: to
        make 9 000 files takes 6 s then and not 3.
        """
        for name in names:
            if os.path.lexists(self.path(name)):
                self.removed += 1
                os.rename(self.path(name),
                          self.path('removed-%d' % self.removed))

    def quiet(self, command, **options):
        """Run something that is not measured; its standard output."""
        done = subprocess.run(
            command, env=self.env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=self.root, **options)
        if done.returncode:
            sys.exit('exit %d: %s\n%s' % (
                done.returncode, ' '.join(command),
                done.stderr.decode(errors='replace')))
        return done.stdout

    def measure(self, command, cwd=None, server=None):
        """Run a command, a success; what it took, as a dict.

        seconds; cpu, seconds; peak, bytes; the last two also of the process
        `server`, if given, as server_cpu and server_peak.
        """
        os.sync()
        watched = [server] if server else []
        before = sum(map(processor, watched))
        with open(self.path('stderr'), 'w+b') as said:
            start = time.monotonic()
            child = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=said,
                cwd=cwd or self.root)
            sampler = Sampler(child.pid, *watched)
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.monotonic() - start
            most = sampler.end()
            child.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            if child.returncode:
                sys.exit('exit %d: %s\n%s' % (
                    child.returncode, ' '.join(command),
                    said.read().decode(errors='replace')))
        # A child's account begins with the memory of its parent.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        noted = usage.ru_maxrss if usage.ru_maxrss > own else 0
        out = {'seconds': seconds, 'cpu': usage.ru_utime + usage.ru_stime,
               'peak': max(most[child.pid], noted * 1024)}
        if server:
            out['server_cpu'] = processor(server) - before
            out['server_peak'] = max(most[server], memory(server))
        return out

    def start(self, command, **options):
        """A server that lives until stop()."""
        child = subprocess.Popen(command, env=self.env, cwd=self.root,
                                 stdin=subprocess.DEVNULL, **options)
        self.servers.append(child)
        return child

    def stop(self):
        """End the servers."""
        for child in self.servers:
            child.terminate()
            child.communicate()
        self.servers = []

    def serve(self, name, *options):
        """A new server directory, served over TLS on the loopback.

        (process, HOST:PORT, fingerprint); the account is `bench`.
        """
        pin = self.quiet(self.script(
            'tarsnapd', 'init', self.path(name), '--listen',
            '127.0.0.1:0')).decode().strip()
        self.quiet(self.script('tarsnapd', 'user', self.path(name), 'add',
                               'bench'), input=PASSWORD)
        child = self.start(self.script('tarsnapd', 'serve', self.path(name),
                                       *options), stderr=subprocess.PIPE)
        address = child.stderr.readline().decode().split()[-1]
        return child, address, pin

    def key(self, name, server, pin=''):
        """A full key of a new machine: at a server, or in a directory."""
        words = ['--keyfile', self.path(name), '--machine', name,
                 '--server', server]
        if pin:
            words += ['--user', 'bench', '--fingerprint', pin]
        self.quiet(self.script('keygen', *words),
                   input=PASSWORD if pin else b'')

    def client(self, key, cache, *words):
        """The command line of the client with that key and cache."""
        return self.script(
            'tarsnap', '--no-default-config', '--keyfile', self.path(key),
            '--cachedir', self.path(cache), *words)


##############################################################################
# The report
##############################################################################


def machine():
    """What it ran on."""
    model = ''
    try:
        with open('/proc/cpuinfo') as file:
            model = next((line.partition(':')[2].strip() for line in file
                          if line.startswith('model name')), '')
    except OSError:
        pass
    return {'processors': os.cpu_count(), 'model': model,
            'system': platform.platform(),
            'memory': os.sysconf('SC_PAGE_SIZE')
            * os.sysconf('SC_PHYS_PAGES')}


def versions(*peers):
    """Of the interpreter, its libraries, ours and the peers that are here."""
    out = {'python': platform.python_version()}
    for name, command in (
            ('tarsnap', [sys.executable, os.path.join(HERE, 'tarsnap.py'),
                         '--version']),
            ('cryptography', [sys.executable, '-c', LIBRARIES]),
            ('borg', ['borg', '--version']),
            ('restic', ['restic', 'version']),
            ('rclone', ['rclone', 'version'])):
        if name in ('tarsnap', 'cryptography') or (
                name in peers and shutil.which(name)):
            done = subprocess.run(command, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
            out[name] = done.stdout.decode().partition('\n')[0].strip()
    return out


class Report:
    """Figures: under some labels, runs, each a dict of numbers."""

    def __init__(self, name, args, *peers):
        self.document = {
            'benchmark': name, 'begun': int(time.time()),
            'arguments': {key: value for key, value in vars(args).items()
                          if key != 'json'},
            'machine': machine(), 'versions': versions(*peers),
            'figures': []}
        self.figures = self.document['figures']
        self.json = args.json
        print('%(processors)s processors (%(model)s)' %
              self.document['machine'])
        print(', '.join('%s: %s' % pair for pair in sorted(
            self.document['versions'].items())))

    def find(self, **labels):
        """The figures that have all these labels."""
        return [figure for figure in self.figures
                if all(figure.get(key) == value
                       for key, value in labels.items())]

    def add(self, run, **labels):
        """Keep one run, and the summary of all with these labels."""
        for figure in self.find(**labels):
            break
        else:
            figure = dict(labels, runs=[])
            self.figures.append(figure)
        figure['runs'].append(run)
        for key in run:
            values = [each[key] for each in figure['runs']]
            figure[key] = {'median': statistics.median(values),
                           'least': min(values), 'most': max(values)}
        return figure

    def write(self):
        """The JSON document, if one is wanted."""
        if self.json:
            with open(self.json, 'w') as file:
                json.dump(self.document, file, indent=1)
                file.write('\n')


def spread(values, digits=2):
    """`median (least-most)` of a summary."""
    return '%.*f (%.*f-%.*f)' % (digits, values['median'], digits,
                                 values['least'], digits, values['most'])


def megabytes(values):
    """The most of a summary of bytes, in MB; `-` for what was over before
    anybody looked.
    """
    return '%.0f' % (values['most'] / 1e6) if values['most'] else '-'


def table(rows):
    """Print rows of text, the first being the head; columns but the first
    two to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(text.ljust(width) if i < 2 else text.rjust(width)
                        for i, (text, width) in enumerate(
                            zip(row, widths))).rstrip())


def numbers(text):
    """1000,20000 as a list."""
    return [int(word) for word in text.split(',')]


def words(text):
    return text.split(',')


def positive(text):
    """1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parser(doc, runs):
    """The options all benchmarks have; `doc` is the module's docstring."""
    out = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument('--runs', type=positive, default=runs, metavar='N',
                     help='times that each work is done (%d)' % runs)
    out.add_argument('--json', metavar='FILE',
                     help='write every single run and the summaries there')
    out.add_argument('--dir', metavar='DIR',
                     help='work below this directory, not the usual '
                     'temporary one')
    return out


def parse(out, **quick):
    """The arguments of this process; with --quick, `quick` is what is usual:
    small numbers, to see that a benchmark works.
    """
    out.add_argument('--quick', action='store_true',
                     help='small numbers: it works, its figures say nothing')
    if '--quick' in sys.argv[1:]:
        out.set_defaults(runs=1, **quick)
    return out.parse_args()
