# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
# Written by contrib/completions.py; change that instead.

# The options of a program, and what may follow one of them.
_tarsnap_options() {
    case $1 in
    'tarsnap')
        echo "
            --absolute-paths --accept-rollback --aggressive-networking
            --archive-names --by-creation --cachedir --cd --check-links
            --checkpoint-bytes --chroot --command --compression --configfile
            --confirmation --create --creationtime --csv-file
            --debug-network-stats --delete --dereference --diff --directory
            --disk-pause --dry-run --dry-run-metadata --dump-config --exclude
            --exclude-caches --exclude-from --exclude-if-present
            --expect-head --expire --extract --fast-read --file --files-from
            --follow-operands --force-resources --fsck --fsck-prune --hashes
            --help --humanize-numbers --include --initialize-cachedir
            --insane-filesystems --insecure --interactive --iso-dates --json
            --keep-daily --keep-going --keep-hourly --keep-last
            --keep-monthly --keep-newer-files --keep-old-files --keep-weekly
            --keep-within --keep-yearly --keyfile --last-backup-age --list
            --list-archives --lock-wait --lowmem --max-age --maxbw
            --maxbw-rate --maxbw-rate-down --maxbw-rate-up
            --modification-time --newer --newer-ctime --newer-ctime-than
            --newer-mtime --newer-mtime-than --newer-than
            --no-aggressive-networking --no-by-creation --no-config-exclude
            --no-config-include --no-default-config --no-disk-pause
            --no-exclude-caches --no-force-resources --no-humanize-numbers
            --no-insane-filesystems --no-iso-dates --no-maxbw
            --no-maxbw-rate-down --no-maxbw-rate-up --no-noatime --no-nodump
            --no-pad --no-print-stats --no-progress --no-progress-bytes
            --no-quiet --no-recursion --no-retry-forever --no-same-owner
            --no-same-permissions --no-snaptime --no-store-atime --no-totals
            --noatime --nodump --noisy-warnings --norecurse --normalmem
            --nuke --null --null-input --null-output --numeric-owner
            --one-file-system --passphrase --passphrase-stdin
            --preserve-permissions --print-head --print-stats --progress
            --progress-bytes --quiet --read-data --read-full-blocks --recover
            --rename --resume-extract --retry-forever --same-owner
            --same-permissions --series --server --since-commit --snaptime
            --sparse --store-atime --strip-components --to-stdout --totals
            --undelete --unlink --unlink-first --usage --verbose --verify
            --verify-config --verify-encode --verify-share --version
            --verylowmem --warn-age -B -C -H -I -L -O -P -S -T -U -W -X -c -d
            -f -h -k -l -m -n -o -p -q -r -s -t -v -w -x" ;;
    'tarsnap-keygen')
        echo "
            --fingerprint --help --keyfile --machine --new-passphrase
            --passphrase --passphrase-mem --passphrase-time --passphrased
            --server --user --version" ;;
    'tarsnap-keyregen')
        echo "
            --fingerprint --force-resources --help --keyfile --machine
            --new-passphrase --oldkey --passphrase --passphrase-mem
            --passphrase-time --passphrased --server --user --version" ;;
    'tarsnap-keymgmt')
        echo "
            --force-resources --help --new-passphrase --nuke --outkeyfile
            --passphrase --passphrase-mem --passphrase-time --passphrased
            --print-fingerprint --print-key-id --print-key-permissions
            --prune --version -d -r -w" ;;
    'tarsnap-recrypt')
        echo "
            --force-resources --help --new-passphrase --newcachedir --newkey
            --oldcachedir --oldkey --passphrase --version" ;;
    esac
}

_tarsnap_argument() {
    case $1 in
    'tarsnap --cachedir' | 'tarsnap --cd' | 'tarsnap --directory' | \
    'tarsnap -C' | 'tarsnap-recrypt --newcachedir' | \
    'tarsnap-recrypt --oldcachedir')
        echo "DIR" ;;
    'tarsnap --archive-names' | 'tarsnap --configfile' | 'tarsnap --csv-file' \
    | 'tarsnap --exclude-from' | 'tarsnap --files-from' | 'tarsnap --keyfile' \
    | 'tarsnap --newer-ctime-than' | 'tarsnap --newer-mtime-than' | \
    'tarsnap --newer-than' | 'tarsnap --snaptime' | 'tarsnap -I' | \
    'tarsnap -T' | 'tarsnap -X' | 'tarsnap-keygen --keyfile' | \
    'tarsnap-keyregen --keyfile' | 'tarsnap-keyregen --oldkey' | \
    'tarsnap-keymgmt --outkeyfile' | 'tarsnap-keymgmt --print-fingerprint' | \
    'tarsnap-keymgmt --print-key-id' | \
    'tarsnap-keymgmt --print-key-permissions' | 'tarsnap-recrypt --newkey' | \
    'tarsnap-recrypt --oldkey')
        echo "FILE" ;;
    'tarsnap --checkpoint-bytes' | 'tarsnap --command' | \
    'tarsnap --creationtime' | 'tarsnap --disk-pause' | 'tarsnap --exclude' | \
    'tarsnap --exclude-if-present' | 'tarsnap --expect-head' | \
    'tarsnap --file' | 'tarsnap --include' | 'tarsnap --keep-daily' | \
    'tarsnap --keep-hourly' | 'tarsnap --keep-last' | \
    'tarsnap --keep-monthly' | 'tarsnap --keep-weekly' | \
    'tarsnap --keep-within' | 'tarsnap --keep-yearly' | 'tarsnap --lock-wait' \
    | 'tarsnap --max-age' | 'tarsnap --maxbw' | 'tarsnap --maxbw-rate' | \
    'tarsnap --maxbw-rate-down' | 'tarsnap --maxbw-rate-up' | \
    'tarsnap --newer' | 'tarsnap --newer-ctime' | 'tarsnap --newer-mtime' | \
    'tarsnap --progress-bytes' | 'tarsnap --rename' | 'tarsnap --series' | \
    'tarsnap --server' | 'tarsnap --since-commit' | \
    'tarsnap --strip-components' | 'tarsnap --verify-share' | \
    'tarsnap --warn-age' | 'tarsnap -W' | 'tarsnap -f' | 'tarsnap -s' | \
    'tarsnap-keygen --fingerprint' | 'tarsnap-keygen --machine' | \
    'tarsnap-keygen --passphrase-mem' | 'tarsnap-keygen --passphrase-time' | \
    'tarsnap-keygen --server' | 'tarsnap-keygen --user' | \
    'tarsnap-keyregen --fingerprint' | 'tarsnap-keyregen --machine' | \
    'tarsnap-keyregen --passphrase-mem' | \
    'tarsnap-keyregen --passphrase-time' | 'tarsnap-keyregen --server' | \
    'tarsnap-keyregen --user' | 'tarsnap-keymgmt --passphrase-mem' | \
    'tarsnap-keymgmt --passphrase-time')
        echo "OTHER" ;;
    'tarsnap --passphrase' | 'tarsnap-keygen --new-passphrase' | \
    'tarsnap-keygen --passphrase' | 'tarsnap-keyregen --new-passphrase' | \
    'tarsnap-keyregen --passphrase' | 'tarsnap-keymgmt --new-passphrase' | \
    'tarsnap-keymgmt --passphrase' | 'tarsnap-recrypt --new-passphrase' | \
    'tarsnap-recrypt --passphrase')
        echo "dev:tty-stdin dev:tty-once dev:stdin-once env: file:" ;;
    'tarsnap --compression')
        echo "none 1 2 3 4 5 6 7 8 9" ;;
    esac
}

_tarsnap() {
    local word=$2 before=$3 kind IFS=$' \t\n'
    # A break at `=` leaves --name, = and the argument.
    [[ $word == = ]] && word=
    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    kind=$(_tarsnap_argument "${1##*/} $before")
    case $kind in
    FILE) compopt -o default ;;
    DIR) compopt -o dirnames ;;
    [A-Z]*) ;;
    ?*) COMPREPLY=($(compgen -W "$kind" -- "$word")) ;;
    '')
        case $word in
        -*) COMPREPLY=($(compgen -W "$(_tarsnap_options "${1##*/}")" \
            -- "$word")) ;;
        *) compopt -o default ;;
        esac ;;
    esac
}

complete -F _tarsnap \
    tarsnap tarsnap-keygen tarsnap-keyregen tarsnap-keymgmt tarsnap-recrypt
