#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""cronwatch measured: its miner, its judgement, what it costs.

    miner   lines grouped by template, against labels: grouping accuracy and
            pairwise F1, beside drain3 in the same run.  With --logs DIR on
            LogHub's samples (X_2k.log_structured.csv, anywhere below DIR),
            else on labelled lines of the generator.
    judge   months of made mail with faults put in (bench/cronmails.py):
            recall by class of fault, false alarms, mails never shown,
            beside simpler ways to watch the same mails.
    scale   CPU seconds of one delivery and the size of the state.

The rules were tuned on the generator's seeds 1 to 9; what is printed without
--seeds is of seeds 101 and following, which were only judged.
"""

import compileall
import csv
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import common
import cronmails

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
sys.path.insert(0, os.path.join(ROOT, 'tests'))

import cronwatch    # noqa: E402
import installed    # noqa: E402

DRAIN = 'drain3==0.9.11'
DAY = cronmails.DAY


def workplace(args):
    """A temporary directory, in memory if there is none wanted: what is
    measured is CPU and judgement, not the disk."""
    return tempfile.TemporaryDirectory(dir=args.dir or next(
        (path for path in ('/dev/shm',) if os.access(path, os.W_OK)), None))


##############################################################################
# Miner: grouping accuracy and pairwise F1
#
# As in the evaluation of LogHub's authors: a line counts when its group is,
# as a set of lines, a true group; F1 is over pairs of lines put together.
# Lines without a label are left out.
##############################################################################

def grouping(truth, found):
    """(grouping accuracy, F1 of pairs) of two lists of labels."""
    pairs, true_size, found_size = {}, {}, {}
    for a, b in zip(truth, found):
        pairs[a, b] = pairs.get((a, b), 0) + 1
        true_size[a] = true_size.get(a, 0) + 1
        found_size[b] = found_size.get(b, 0) + 1
    right = sum(count for (a, b), count in pairs.items()
                if count == true_size[a] == found_size[b])

    def couples(sizes):
        return sum(n * (n - 1) // 2 for n in sizes.values())
    both, ours, real = couples(pairs), couples(found_size), couples(true_size)
    precision = both / ours if ours else 1.
    recall = both / real if real else 1.
    f1 = 2 * precision * recall / (precision + recall) if both else float(
        not ours and not real)
    return right / max(1, len(truth)), f1


def sample_read(path):
    """(lines, labels) of one X_structured.csv."""
    csv.field_size_limit(1 << 24)
    with open(path, encoding='utf-8-sig', errors='replace',
              newline='') as file:
        rows = csv.DictReader((line.replace('\0', '') for line in file))
        pairs = [(row.get('Content') or '', row['EventId'].strip())
                 for row in rows if (row.get('EventId') or '').strip()]
    return [a for a, _ in pairs], [b for _, b in pairs]


def samples(folder):
    """Yield (system, lines, labels) of LogHub's samples below a directory."""
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith('_structured.csv'):
                lines, labels = sample_read(os.path.join(base, name))
                yield name.split('_')[0].split('.')[0], lines, labels


def made_lines(seeds, days=8):
    """Yield (kind, lines, labels) of the generator's jobs."""
    for seed in seeds:
        made = cronmails.corpus(seed, days=days, learning=days)
        for job in made.jobs:
            lines, labels = [], []
            for mail in made.mails:
                if mail.job == job.number and len(lines) < 2000:
                    lines += mail.texts
                    labels += mail.labels
            if lines:
                yield '%s/%s' % (seed, job.kind.name), lines, labels


def mine(lines):
    """Our group of each line, once all of them are known."""
    miner = cronwatch.Miner()
    keys = [miner.add(line)[0] for line in lines]
    return [miner.same(key) for key in keys]


# Run by the interpreter of drain3's environment: lists of lines in, lists of
# groups out, once as it comes and once with the masks of its own example.
DRAIN_RUN = r'''
import json, sys
from drain3 import TemplateMiner
from drain3.masking import MaskingInstruction
from drain3.template_miner_config import TemplateMinerConfig
EDGE, END = r"((?<=[^A-Za-z0-9])|^)", r"((?=[^A-Za-z0-9])|$)"
MASKS = [(r"(([0-9a-f]{2,}:){3,}([0-9a-f]{2,}))", "ID"),
         (r"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})", "IP"),
         (r"([0-9a-f]{6,} ?){3,}", "SEQ"), (r"([0-9A-F]{4} ?){4,}", "SEQ"),
         (r"(0x[a-f0-9A-F]+)", "HEX"), (r"([\-\+]?\d+)", "NUM")]
for line in sys.stdin:
    out = []
    for masked in (False, True):
        config = TemplateMinerConfig()
        config.profiling_enabled = False
        if masked:
            config.drain_extra_delimiters = ["_"]
            config.masking_instructions = [
                MaskingInstruction(EDGE + mask + END, name)
                for mask, name in MASKS]
        miner = TemplateMiner(config=config)
        out.append([miner.add_log_message(text)["cluster_id"]
                    for text in json.loads(line)])
    print(json.dumps(out), flush=True)
'''


class Drain:
    """drain3 in a process and an environment of its own."""

    def __init__(self):
        bin = installed.pip('drain3', DRAIN)
        self.process = subprocess.Popen(
            [os.path.join(bin, 'python'), '-c', DRAIN_RUN],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def groups(self, lines):
        """(groups as it comes, groups with its masks)."""
        self.process.stdin.write(json.dumps(lines) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def miner_bench(args, figures):
    """Print and keep accuracy and F1 by system, and the means."""
    drain = None if args.no_drain else Drain()
    sums, rows = {}, [['system', 'lines', 'GA', 'F1', 'drain3 GA', 'F1',
                       'masked GA', 'F1']]
    source = samples(args.logs) if args.logs else made_lines(args.seeds[:1])
    for name, lines, labels in source:
        begun = time.process_time()
        found = {'cronwatch': mine(lines)}
        spent = time.process_time() - begun
        if drain:
            found['drain3'], found['drain3 masked'] = drain.groups(lines)
        row = [name, str(len(lines))]
        for who, groups in found.items():
            accuracy, f1 = grouping(labels, groups)
            sums.setdefault(who, []).append((accuracy, f1))
            row += ['%.4f' % accuracy, '%.4f' % f1]
            figures.append({'part': 'miner', 'system': name, 'who': who,
                            'lines': len(lines), 'ga': accuracy, 'f1': f1})
            if who == 'cronwatch':
                figures[-1]['us_per_line'] = spent / max(1, len(lines)) * 1e6
        rows.append(row)
    if drain:
        drain.close()
    if len(rows) == 1:
        sys.exit('cron: no X_structured.csv below %s' % args.logs)
    mean = ['mean', '']
    for who, pairs in sums.items():
        mean += ['%.4f' % statistics.mean(column) for column in zip(*pairs)]
        figures.append({'part': 'miner', 'system': 'mean', 'who': who,
                        'ga': statistics.mean(a for a, _ in pairs),
                        'f1': statistics.mean(f for _, f in pairs)})
    rows.append(mean)
    common.table([row + [''] * (8 - len(row)) for row in rows])


##############################################################################
# Rivals: simpler ways to watch the same mails
#
# deliver(mail, raw lines) says whether the mail is shown, check(now) gives
# the numbers of jobs whose mail is missed.
##############################################################################

class ExitCode:
    """cronic and chronic: shown if the command failed."""
    name = 'exit code only'

    def deliver(self, mail):
        return mail.exit != 0

    def check(self, now):
        return []


class ErrorWords(ExitCode):
    """grep -i for the usual words."""
    name = 'grep for error words'
    words = re.compile(r'error|fail|fatal|denied|panic|critical|cannot|'
                       r'unable|refused|not found|timed out|traceback|'
                       r'exception|no space', re.I)

    def deliver(self, mail):
        return any(self.words.search(text) for text in mail.texts)


class KnownLines(ExitCode):
    """logcheck with somebody who adds a rule for each line that is reported:
    digits and long hexadecimal numbers match any others."""
    name = 'known lines'

    def __init__(self):
        self.known = set()

    def deliver(self, mail):
        shapes = {(mail.job, cronmails.shape(text)) for text in mail.texts}
        new = shapes - self.known
        self.known |= new
        return bool(new)


class Length(ExitCode):
    """Shown if it is half or twice as long as the median of the last 30."""
    name = 'length only'

    def __init__(self):
        self.past = {}

    def deliver(self, mail):
        past = self.past.setdefault(mail.job, [])
        size = len(mail.texts)
        usual = statistics.median(past) if len(past) > 5 else size
        past.append(size)
        del past[:-30]
        return size * 2 < usual or size > 2 * usual


class DeadMan(ExitCode):
    """A dead man's switch with the right period of each job: half a period
    of grace, one alarm until the next mail."""
    name = 'dead man\'s switch'

    def __init__(self, jobs):
        self.periods = {}
        for job in jobs:
            every = job.schedule[0]
            self.periods[job.number] = DAY * (
                every / 24 if isinstance(every, int) else
                {'d': 1, 'w': 3.2 if every == 'work' else 7, 'm': 31}[
                    every[0]])
        self.seen, self.told = {}, set()

    def deliver(self, mail):
        self.seen[mail.job] = mail.time
        self.told.discard(mail.job)
        return False

    def check(self, now):
        late = [job for job, seen in self.seen.items()
                if now - seen > 1.5 * self.periods[job]
                and job not in self.told]
        self.told.update(late)
        return late


class Ours:
    """cronwatch on a state file in a directory."""
    name = 'cronwatch'

    def __init__(self, folder):
        self.watch = cronwatch.Watch(os.path.join(folder, 'state.db'))
        self.jobs = {}          # name of a job, as cronwatch says -> number
        self.kinds = {}         # what was found, of the last call

    def deliver(self, mail):
        run = cronwatch.mail_read(mail.raw, mail.time)
        self.jobs.setdefault(run.name, mail.job)
        found = [each for each in self.watch.deliver(mail.raw, mail.time)
                 if each.severity != cronwatch.NOTICE]
        self.kinds = {mail.job: found}
        return bool(found)

    def check(self, now):
        self.kinds = {}
        for each in self.watch.check(now):
            if each.severity != cronwatch.NOTICE and each.job in self.jobs:
                self.kinds.setdefault(self.jobs[each.job], []).append(each)
        return list(self.kinds)


##############################################################################
# Judge: alarms against faults
##############################################################################

class Score:
    """What one watcher did with one corpus."""

    def __init__(self, made):
        self.made = made
        self.begin = cronmails.stamp_of(cronmails.EPOCH, 'UTC')
        self.learned = self.begin + made.learning * DAY
        self.windows = {}
        for fault in made.faults:
            self.windows.setdefault(fault.job.number, []).append(fault)
        self.found = {}         # number of the fault -> time of first alarm
        self.alarms = []        # (time, job, fault or None, kinds)
        self.shown = 0          # mails

    def alarm(self, now, job, kinds=()):
        fault = next((each for each in self.windows.get(job, ())
                      if each.start <= now <= each.end), None)
        if fault:
            self.found.setdefault(fault.number, now)
        self.alarms.append((now, job, fault, list(kinds)))

    def figures(self):
        """The figures of all of it, as a dict."""
        made = self.made
        late = [each for each in self.alarms if each[0] >= self.learned]
        false = [each for each in late if each[2] is None]
        days = made.days - made.learning
        after = sum(1 for mail in made.mails if mail.time >= self.learned)
        classes, kinds = {}, {}
        for fault in made.faults:
            entry = classes.setdefault(fault.kind, [0, 0])
            entry[0] += fault.number in self.found
            entry[1] += 1
        for _, _, fault, found in late:
            for kind in found:
                entry = kinds.setdefault(kind, [0, 0])
                entry[0] += fault is not None
                entry[1] += 1
        return {
            'recall': len(self.found) / max(1, len(made.faults)),
            'precision': 1 - len(false) / max(1, len(late)),
            'faults': len(made.faults), 'found': len(self.found),
            'mails': len(made.mails), 'alarms': len(late),
            'false': len(false), 'early': len(self.alarms) - len(late),
            'false a job and quarter': len(false) / len(made.jobs) / days
            * 90,
            'alarms a job and month': len(late) / len(made.jobs) / days * 30,
            'never shown': 1 - self.shown / max(1, after),
            'classes': classes, 'kinds': kinds}


def watched(made, watcher, every=3600, verbose=False):
    """Feed a corpus to a watcher, with a check every hour; the Score."""
    score, tick = Score(made), None
    for mail in made.mails:
        tick = mail.time if tick is None else tick
        while tick + every <= mail.time:
            tick += every
            for job in watcher.check(tick):
                found = getattr(watcher, 'kinds', {}).get(job, ())
                score.alarm(tick, job, {each.kind for each in found})
                if verbose:
                    tell(score, made, job, found)
        if watcher.deliver(mail):
            found = getattr(watcher, 'kinds', {}).get(mail.job, ())
            score.alarm(mail.time, mail.job, {each.kind for each in found})
            score.shown += mail.time >= score.learned
            if verbose:
                tell(score, made, mail.job, found)
    return score


def tell(score, made, job, found):
    """One line for the last alarm, to tune by."""
    now, _, fault, _ = score.alarms[-1]
    if now < score.learned:
        return
    name = made.jobs[job].kind.name
    for each in found:
        print('%s %7.2f %-12s %-12s %s' % (
            'right' if fault else 'FALSE', (now - score.begin) / DAY,
            name, fault.kind if fault else each.kind, each.reason))


def judge_bench(args, figures):
    """Print and keep what cronwatch and its rivals find."""
    totals = {}
    for seed in args.seeds:
        made = cronmails.corpus(seed, args.jobs, args.days, args.learning)
        with workplace(args) as folder:
            watchers = [Ours(folder)] + ([] if args.alone else [
                ExitCode(), ErrorWords(), KnownLines(), Length(),
                DeadMan(made.jobs)])
            for watcher in watchers:
                score = watched(made, watcher, verbose=args.verbose
                                and watcher.name == 'cronwatch')
                result = score.figures()
                figures.append(dict(result, part='judge', seed=seed,
                                    who=watcher.name))
                totals.setdefault(watcher.name, []).append(result)
                if args.verbose and watcher.name == 'cronwatch':
                    for fault in made.faults:
                        if fault.number not in score.found:
                            print('MISSED %7.2f %-12s %s' % (
                                (fault.start - score.begin) / DAY,
                                fault.job.kind.name, fault.kind))
    rows = [['watcher', '', 'recall', 'precision', 'false a job and quarter',
             'alarms a job and month', 'never shown']]
    for name, results in totals.items():
        rows.append([name, ''] + ['%.3f' % statistics.mean(
            result[key] for result in results) for key in (
            'recall', 'precision', 'false a job and quarter',
            'alarms a job and month', 'never shown')])
    common.table(rows)
    for key, head in (('classes', 'fault'), ('kinds', 'alarm')):
        rows = [[head, ''] + list(totals)]
        for name in sorted({name for results in totals.values()
                            for result in results for name in result[key]}):
            row = [name, '']
            for results in totals.values():
                part, whole = [sum(result[key].get(name, (0, 0))[i]
                                   for result in results) for i in (0, 1)]
                row.append('%d/%d' % (part, whole))
            rows.append(row)
        print()
        common.table(rows)


def learning_bench(args, figures):
    """Recall by age of the job, for faults that begin early."""
    made = cronmails.corpus(args.seeds[0], args.jobs, 60, 1, 3)
    with workplace(args) as folder:
        score = watched(made, Ours(folder))
    ages = {}
    for fault in made.faults:
        age = (fault.start - score.begin) / DAY
        entry = ages.setdefault(next(
            limit for limit in (3, 7, 14, 21, 30, 60) if age < limit),
            [0, 0])
        entry[0] += fault.number in score.found
        entry[1] += 1
    print()
    for limit, (part, whole) in sorted(ages.items()):
        print('days to learn: before day %2d, %d of %d faults found' % (
            limit, part, whole))
        figures.append({'part': 'learning', 'before': limit, 'found': part,
                        'faults': whole})


##############################################################################
# Scale: many jobs in one state file
##############################################################################

def deliver_cpu(mail, folder, *how):
    """CPU seconds of a process that takes one mail."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *how, '--dir', folder, 'deliver'],
                   input=mail.raw, cwd=folder, check=False,
                   env=dict(os.environ, PATH=folder))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime
            - before.ru_stime)


def scale_bench(args, figures):
    """CPU of one delivery by the program, and the size of the state."""
    jobs, mails = (1000, 100000) if args.whole else (
        (100, 4000) if not args.quick else (10, 100))
    made = cronmails.corpus('scale', jobs, mails // jobs * 2, 10 ** 6)
    daily = [mail for mail in made.mails if made.jobs[mail.job].schedule[0]
             != 1 or int(mail.time) % 7 == 0]
    chosen, last = daily[:mails], daily[mails:mails + args.deliveries]
    with workplace(args) as folder:
        ours = cronwatch.Watch(os.path.join(folder, 'state.db'))
        begun = time.process_time()
        for mail in chosen:
            ours.deliver(mail.raw, mail.time)
        inner = (time.process_time() - begun) / max(1, len(chosen))
        del ours
        shutil.copy(os.path.join(ROOT, 'cronwatch.py'), folder)
        compileall.compile_file(os.path.join(folder, 'cronwatch.py'),
                                quiet=1)
        bare = [deliver_cpu(mail, folder, '-c', 'pass') for mail in last[:5]]
        installed = [deliver_cpu(mail, folder, '-m', 'cronwatch')
                     for mail in last]
        script = [deliver_cpu(mail, folder, 'cronwatch.py')
                  for mail in last[:5]]
        shutil.rmtree(os.path.join(folder, '__pycache__'))
        os.remove(os.path.join(folder, 'cronwatch.py'))
        size = sum(os.path.getsize(os.path.join(folder, name))
                   for name in os.listdir(folder))
    result = {'part': 'scale', 'jobs': len({m.job for m in chosen}),
              'mails': len(chosen),
              'cpu_ms': statistics.median(installed) * 1e3,
              'cpu_ms_most': max(installed) * 1e3,
              'script_ms': statistics.median(script) * 1e3,
              'bare_ms': statistics.median(bare) * 1e3,
              'inner_ms': inner * 1e3,
              'bytes_a_job': size / max(1, len({m.job for m in chosen}))}
    figures.append(result)
    print()
    print('%(jobs)d jobs, %(mails)d mails: a delivery takes %(cpu_ms).0f ms'
          ' of CPU with start-up, at most %(cpu_ms_most).0f: %(bare_ms).0f of'
          ' them the interpreter itself, %(inner_ms).1f the mail;'
          ' %(script_ms).0f as a script that is not compiled;'
          ' %(bytes_a_job).0f bytes a job' % result)


def main():
    out = common.parser(__doc__, 1)
    out.add_argument('--logs', metavar='DIR', help='LogHub\'s samples')
    out.add_argument('--part', action='append', choices=(
        'miner', 'judge', 'learning', 'scale'), help='only this (again: and'
        ' that)')
    out.add_argument('--seeds', type=common.words, default=['101', '102'])
    out.add_argument('--jobs', type=int, default=len(cronmails.KINDS))
    out.add_argument('--days', type=int, default=180)
    out.add_argument('--learning', type=int, default=45, metavar='DAYS')
    out.add_argument('--deliveries', type=int, default=40)
    out.add_argument('--whole', action='store_true', help='scale: 1 000 jobs'
                     ' and 100 000 mails')
    out.add_argument('--alone', action='store_true', help='no rivals')
    out.add_argument('--no-drain', action='store_true', help='no drain3')
    out.add_argument('--verbose', action='store_true', help='tell each alarm'
                     ' and what was missed')
    args = common.parse(out, jobs=4, days=40, learning=30, deliveries=2,
                        seeds=['101'])
    report = common.Report('cron', args)
    parts = args.part or (['miner'] if args.logs else
                          ['miner', 'judge', 'learning', 'scale'])
    for part in parts:
        {'miner': miner_bench, 'judge': judge_bench,
         'learning': learning_bench, 'scale': scale_bench}[part](
             args, report.figures)
        print()
    report.write()
    return 0


if __name__ == '__main__':
    sys.exit(main())
