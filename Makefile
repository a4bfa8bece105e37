# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
#
# Nothing is built: the programs run from where they are.  PYTHON chooses the
# interpreter.  If it cannot import cryptography >= 36, a virtual environment
# that can is made in VENV and used instead.

PYTHON = python3
VENV = .venv

# The interpreter of a recipe; every recipe but clean asks for it anew.
FIND = py=$$(sh contrib/python.sh '$(PYTHON)' '$(VENV)')

# What `make demo` backs up; empty: the standard library of the interpreter.
DIR =

# `make demo STORE=s3`: in a bucket of an S3 server made for it.
STORE =

# Where `make shots` puts its pictures.
SHOTS = shots

# Arguments for tests/run.py, such as modules, or -p PATTERN.
TESTS =

# Arguments for tests/crash.py, such as --seconds 60, --seed N or parts.
CRASH =

# Arguments for tests/rot.py, such as --seconds 60, --every or --s3.
ROT =

# Arguments for tests/failing.py, such as --seconds 600, --seed N or parts.
FAULTS =

# Arguments for tests/fuzz.py, such as --seconds 60, --seed N, --target X or
# --engine atheris.
FUZZ =

# Arguments for tests/books.py, such as --events 10000, --seed N or --worlds N.
BOOKS =

# Arguments for tests/model.py, such as --seconds 600, --seed N or --off RULE.
MODEL =

# Arguments for the benchmarks, such as --runs 3, --json FILE or --help.
BENCH =

# What tests run besides Python, as command:package of Debian.
TOOLS = mandoc:mandoc scrypt:scrypt setfattr:attr setfacl:acl rsync:rsync \
	cpio:cpio \
	sshd:openssh-server cc:gcc systemd-socket-activate:systemd \
	stunnel4:stunnel4 spiped:spiped strace:strace \
	apache2:apache2-bin logrotate:logrotate node:nodejs npm:npm \
	chromedriver:chromium-driver

# What the benchmark compares with.
PEERS = restic:restic borg:borgbackup rclone:rclone openssl:openssl

SOURCES = *.py bench/*.py cgi-bin/*.py cgi-bin/*.cgi contrib/*.py tests/*.py

help:
	@echo 'make demo [DIR=...]    back DIR up, restore it and compare, by'
	@echo '                       directory and over the network;'
	@echo '                       STORE=s3 keeps it all in a bucket'
	@echo 'make web               the account pages under an Apache of their own,'
	@echo '                       with a sample account'
	@echo 'make shots [SHOTS=DIR] pictures of all of them, into DIR'
	@echo 'make test [TESTS=...]  run the tests'
	@echo 'make crash [CRASH=...] kill and cut the power at any call, for ten'
	@echo '                       minutes; nothing may be lost'
	@echo 'make rot [ROT=...]     flip bytes of everything stored, for ten'
	@echo '                       minutes; each must be named'
	@echo 'make faults [FAULTS=...] fail each call once, in every way, which'
	@echo '                       takes hours; FAULTS="--seconds 600" a share'
	@echo 'make fuzz [FUZZ=...]   hostile bytes for everything that takes bytes'
	@echo '                       apart, half an hour; FUZZ=--list names what'
	@echo 'make books [BOOKS=...] bill late, twice, killed and with clocks gone'
	@echo '                       wrong; the ledger must add up'
	@echo 'make model [MODEL=...] explore how two servers and their clients may'
	@echo '                       meet, for a minute; nothing may be lost'
	@echo 'make bench [BENCH=...] time it beside restic and borg: a small tree,'
	@echo '                       a large one, one file of 1 GB; 5 rounds'
	@echo 'make bench-quick       the small tree, one round'
	@echo 'make bench-growth      time and memory by files, archives, blocks'
	@echo 'make bench-network     the main job over a slow link'
	@echo 'make bench-load        one server under many sessions'
	@echo 'make bench-rebuild     the index of a million blocks made anew'
	@echo 'make bench-login       whether time tells which users there are'
	@echo 'make bench-web         what a page of an account costs'
	@echo 'make bench-bill        the days of many accounts charged'
	@echo 'make bench-cron [LOGS=dir] how well cronwatch groups lines of logs,'
	@echo '                       and finds what is wrong in made mails'
	@echo 'make lint              check sources and manual pages'
	@echo 'make clean             remove what these make'
	@echo 'PYTHON=... chooses the interpreter, VENV=... where one is made.'

demo:
	@$(FIND) && exec "$$py" contrib/demo.py $(STORE:%=--%) $${DIR:+"$$DIR"}

web: tools
	@$(FIND) && exec "$$py" tests/webpeer.py

shots: tools
	@$(FIND) && exec "$$py" tests/chromium.py $(SHOTS)

test: tools
	@$(FIND) && exec "$$py" tests/run.py $(TESTS)

crash: tools
	@$(FIND) && exec "$$py" tests/crash.py $(CRASH)

rot:
	@$(FIND) && exec "$$py" tests/rot.py $(ROT)

faults: tools
	@$(FIND) && exec "$$py" tests/failing.py $(FAULTS)

fuzz:
	@$(FIND) && exec "$$py" tests/fuzz.py $(FUZZ)

books:
	@$(FIND) && exec "$$py" tests/books.py $(BOOKS)

model:
	@$(FIND) && exec "$$py" tests/model.py $(MODEL)

bench: peers
	@$(FIND) && exec "$$py" bench/compare.py --tree small --tree large \
	    --tree file $(BENCH)

bench-quick: peers
	@$(FIND) && exec "$$py" bench/compare.py --runs 1 $(BENCH)

# LOGS: a directory with LogHub's samples, to measure the miner on.
bench-cron:
	@$(FIND) && exec "$$py" bench/cron.py $(LOGS:%=--logs %) $(BENCH)

bench-growth bench-network bench-load bench-rebuild bench-login bench-web \
    bench-bill:
	@$(FIND) && exec "$$py" bench/$(@:bench-%=%).py $(BENCH)

# As root on Debian what is missing is installed; elsewhere the tests and the
# benchmark that need it say so.
tools: WANTED = $(TOOLS)
peers: WANTED = $(PEERS)
tools peers:
	@PATH=$$PATH:/usr/sbin:/sbin; missing=; \
	for tool in $(WANTED); do \
		command -v $${tool%%:*} >/dev/null || \
			missing="$$missing $${tool#*:}"; \
	done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && \
	    command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		(apt-get -q update && DEBIAN_FRONTEND=noninteractive \
		    apt-get -q -y --no-install-recommends install $$missing) \
		    >/dev/null || echo 'that failed; what needs it will say so'; \
	fi

# ruff, or where there is none a virtual environment with it.
lint:
	@ruff=ruff; ruff --version >/dev/null 2>&1 || { \
		$(FIND) && ruff=$(VENV)-lint/bin/ruff && \
		{ $$ruff --version >/dev/null 2>&1 || { \
			"$$py" -m venv $(VENV)-lint && \
			$(VENV)-lint/bin/python -m pip -q install ruff; }; }; \
	}; \
	$$ruff check --no-cache --quiet --isolated --target-version py39 \
	    --line-length 79 --select E501,E7,E9,F,W $(SOURCES)
	@if command -v mandoc >/dev/null; then \
		mandoc -T lint -W warning man/*.[1-9]; \
	else \
		echo 'no mandoc: the manual pages are not checked'; \
	fi
	@! LC_ALL=C.UTF-8 grep -nE '^.{80}' man/*.[1-9] contrib/*.sh Makefile .ci/run

clean:
	rm -rf .venv .venv-* shots build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo web shots test crash fuzz rot faults books model bench \
	bench-quick \
	bench-growth bench-network bench-load bench-rebuild bench-login \
	bench-web bench-cron bench-bill tools \
	peers lint clean
