# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What lies beside the server: units of systemd, the script for FreeBSD's rc,
and what stands in front of it, stunnel and spiped, each by the real program.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import unittest

import world
from rawclient import tarsnapd
from s3peers import free_ports
from test_server_lifecycle import until

CONTRIB = os.path.join(world.ROOT, 'contrib')
UNITS = ('tarsnapd.service', 'tarsnapd.socket', 'tarsnapd-check.service',
         'tarsnapd-check.timer', 'tarsnapd-spiped.service',
         'tarsnap-spiped.service')


def read(name):
    with open(os.path.join(CONTRIB, name)) as file:
        return file.read()


def need(case, program, package):
    """The path of a program, or the test is skipped."""
    found = shutil.which(program, path=os.environ['PATH'] + ':/usr/sbin:/sbin')
    if not found:
        case.skipTest('no %s (Debian: %s)' % (program, package))
    return found


def listens(port):
    try:
        socket.create_connection(('127.0.0.1', port)).close()
        return True
    except OSError:
        return False


class Fronts(unittest.TestCase):

    def setUp(self):
        self.world = w = world.World(self, 'tls')
        world.tree_small(w.path('tree'), 1)

    def front(self, argv, port):
        """A program that listens at `port`, which clients go to from now."""
        running = self.world.spawn(argv, env=dict(os.environ))
        until(lambda: listens(port) or running.process.poll() is not None)
        self.assertIsNone(running.process.poll(), running.text())
        self.world.address = '127.0.0.1:%d' % port
        return running

    def job(self):
        """A backup, its restore, its end, and the canary, through it."""
        w = self.world
        w.keygen()
        for name in ('one', 'two'):
            w.ok('-c', '-f', name, '-C', w.root, 'tree')
        w.ok('-d', '-f', 'one')
        world.tree_equal(self, w.path('tree'), os.path.join(
            w.extract('two', cache=None), 'tree'))
        done = w.tarsnapd('check', w.server.path, '--server', w.address)
        self.assertIn('tarsnapd OK - ' + w.address, done.out)

    def certificate(self, name, serial):
        path = self.world.path(name)
        with open(path, 'wb') as file:
            file.write(b''.join(tarsnapd.certificate_make(serial)))
        os.chmod(path, 0o600)
        return path

    def stunnel(self, pem):
        """stunnel by our configuration, with places of the test."""
        program = need(self, 'stunnel4', 'stunnel4')
        port, = free_ports(1)
        text = read('tarsnapd-stunnel.conf')
        for option, value in (
                ('accept', '127.0.0.1:%d' % port),
                ('connect', '127.0.0.1:%d' % self.world.server.port),
                ('cert', pem), ('pid', self.world.path('stunnel.pid'))):
            text, count = re.subn('(?m)^%s = .*$' % option,
                                  '%s = %s' % (option, value), text)
            self.assertEqual(count, 1, option)
        text = re.sub('(?m)^set[ug]id = .*\n', '', text)
        conf = self.world.path('stunnel.conf')
        with open(conf, 'w') as file:
            file.write('foreground = yes\n' + text)
        return self.front([program, conf], port)

    def test_stunnel(self):
        w = self.world
        server, first = w.server, self.certificate('first.pem', 1)
        with open(os.path.join(server.path, 'tarsnapd.conf'), 'a') as file:
            file.write('front-certificate = %s\n' % first)
        server.restart()
        running = self.stunnel(first)
        self.job()
        # With a certificate that the server does not vouch for.
        running.end()
        running = self.stunnel(self.certificate('other.pem', 2))
        done = w.tarsnap('--list-archives', '--server', w.address)
        self.assertEqual(done.code, 1, done)
        self.assertEqual(done.out, '')
        # Renewed on both sides: the pin in the key stays good.
        running.end()
        shutil.copy(w.path('other.pem'), first)
        server.restart()
        self.stunnel(first)
        done = w.ok('--list-archives', '--server', w.address)
        self.assertEqual(done.out, 'two\n')

    def spiped(self, unit, key, listen, target):
        """spiped by one of our units, with places of the test."""
        program = need(self, 'spiped', 'spiped')
        words = shlex.split(re.search('(?m)^ExecStart=(.*)$', read(unit))[1])
        self.assertEqual(words[0], '/usr/bin/spiped')
        words[0] = program
        for option, value in (('-s', '[127.0.0.1]:%d' % listen),
                              ('-t', '[127.0.0.1]:%d' % target),
                              ('-k', key)):
            words[words.index(option) + 1] = value
        return self.front(words, listen)

    def test_spiped(self):
        w = self.world
        keys = [w.path('spiped.key'), w.path('other.key')]
        for key in keys:
            with open(key, 'wb') as file:
                file.write(os.urandom(32))
        ports = free_ports(3)
        self.spiped('tarsnapd-spiped.service', keys[0], ports[0],
                    w.server.port)
        self.spiped('tarsnap-spiped.service', keys[0], ports[1], ports[0])
        self.job()
        self.spiped('tarsnap-spiped.service', keys[1], ports[2], ports[0])
        done = w.tarsnapd_any('check', w.server.path, '--server', w.address,
                              '--timeout', '20')
        self.assertEqual(done.code, 2, done)


class Units(unittest.TestCase):

    def analyze(self, *words):
        program = need(self, 'systemd-analyze', 'systemd')
        return subprocess.run([program, *words], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)

    def test_verify(self):
        done = self.analyze('verify', '--man=no', *[
            os.path.join(CONTRIB, name) for name in UNITS])
        self.assertEqual((done.returncode, done.stdout), (0, ''))

    def test_security(self):
        # Of 0 to 10, times ten; the network is what is left.
        done = self.analyze('security', '--offline=true', '--threshold=15',
                            '--no-pager', os.path.join(CONTRIB,
                                                       'tarsnapd.service'))
        self.assertEqual(done.returncode, 0, done.stdout[-2000:])

    def names(self, name):
        """The system calls of a set of systemd."""
        found = set()
        for line in self.analyze('syscall-filter', name).stdout.splitlines():
            word = line.strip()
            if word.startswith('@') and word != name:
                found |= self.names(word)
            elif word and word[0] not in '@#':
                found.add(word)
        return found

    def test_its_calls_are_those_the_unit_allows(self):
        strace = need(self, 'strace', 'strace')
        allowed = set()
        for line in re.findall('(?m)^SystemCallFilter=(.*)$',
                               read('tarsnapd.service')):
            change = allowed.difference_update if line[0] == '~' else \
                allowed.update
            for word in line.lstrip('~').split():
                change(self.names(word) if word[0] == '@' else {word})
        self.assertGreater(len(allowed), 200)
        w = world.World(self, 'tls')
        w.server.kill(signal.SIGTERM)
        port, = free_ports(1)
        trace = w.path('trace')
        running = w.spawn([
            strace, '-f', '-qq', '-o', trace, sys.executable,
            w.program('tarsnapd'), 'serve', w.server.path, '--workers', '2',
            '--listen', '127.0.0.1:%d' % port])
        until(lambda: listens(port))
        w.tarsnapd('check', w.server.path, '--server', '127.0.0.1:%d' % port)
        with open('/proc/%d/task/%d/children' % (
                (running.process.pid,) * 2)) as file:
            os.kill(int(file.read().split()[0]), signal.SIGTERM)
        self.assertEqual(running.wait().code, 0)
        with open(trace) as file:
            calls = set(re.findall(r'(?m)^\d+ +([a-z]\w*)\(', file.read()))
        self.assertGreater(len(calls), 40)
        # SQLite gives files to others only as root.
        self.assertLessEqual(calls - {'fchown'} if os.geteuid() == 0
                             else calls, allowed)


# As far as tarsnapd.rc goes: what rc.subr(8) and daemon(8) do of FreeBSD.
SUBR = '''
load_rc_config() { :; }
run_rc_command() {
	case $1 in
	start)
		for dir in $required_dirs; do [ -d "$dir" ] || exit 1; done
		eval "exec $command $command_args" ;;
	stop)
		kill -TERM "$(cat $pidfile)" ;;
	*)
		case " $extra_commands " in *" $1 "*) eval "\\$${1}_cmd" ;; esac ;;
	esac
}
'''
DAEMON = '''#!/bin/sh
while getopts ST:l:R:P:p:u: option; do
	case $option in
	P) supervisor=$OPTARG ;;
	p) child=$OPTARG ;;
	esac
done
shift $((OPTIND - 1))
echo $$ >$supervisor
"$@" &
echo $! >$child
trap 'kill -TERM $(cat $child)' TERM
wait; wait
'''


class FreeBSD(unittest.TestCase):

    def test_rc(self):
        """Started, its journal begun anew, and ended; on a stand-in for rc,
        as there is no FreeBSD here.
        """
        w = world.World(self, 'tls')
        w.server.kill(signal.SIGTERM)
        port, = free_ports(1)
        text = read('tarsnapd.rc')
        for old, new in (('/etc/rc.subr', w.path('subr')),
                         ('/usr/sbin/daemon', w.path('daemon')),
                         ('/var/run', w.root)):
            self.assertIn(old, text)
            text = text.replace(old, new)
        for name, content in (('subr', SUBR), ('daemon', DAEMON),
                              ('rc', text), ('program', (
                                  '#!/bin/sh\nexec %s "$@"\n' % shlex.join(
                                      [sys.executable,
                                       w.program('tarsnapd')])))):
            world.write(w.path(name), content.encode())
            os.chmod(w.path(name), 0o755)
        env = dict(w.environment, tarsnapd_dir=w.server.path,
                   tarsnapd_program=w.path('program'),
                   tarsnapd_args='--listen 127.0.0.1:%d --journal journal'
                   % port)
        running = w.spawn([w.path('rc'), 'start'], env=env)
        until(lambda: listens(port))
        done = w.tarsnapd('check', w.server.path, '--server',
                          '127.0.0.1:%d' % port)
        self.assertEqual(done.code, 0)
        journal = os.path.join(w.server.path, 'journal')
        os.rename(journal, journal + '.0')
        self.assertEqual(w.run([w.path('rc'), 'reload'], env=env).code, 0)
        until(lambda: os.path.exists(journal))
        self.assertEqual(w.run([w.path('rc'), 'stop'], env=env).code, 0)
        until(lambda: not listens(port))
        running.wait()


if __name__ == '__main__':
    unittest.main()
