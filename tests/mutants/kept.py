"""The mutants that are kept: what is wrong with each, and what must catch it."""

from __future__ import annotations

from mutants import Edit, Mutant, Tests, Torture

_TRACED = "power cut, traced"
_LEDGER = "crash ledger"
#: A directory that its row does not answer for, before or after recovery.
_LOST = r"not whole at its name|== set_aside|names - aside"
_REFUSED = "a save went on after"
_AT_GATHERED = r"assert durable_under\(disk, new.staging_directory\) == \[\]"
_AT_COMMITTED = r"assert durable_under\(disk, new.directory\) == \[\]"


def _posix(run: str, phases: str, sign: str = _LOST, most: int = 15) -> Torture:
    return Torture("power cut, posix", f"power loss, posix | {run}", phases, sign, most)


def _ext4(run: str, phases: str, sign: str = _LOST, most: int = 15) -> Torture:
    return Torture("power cut, ext4", f"power loss, ext4 | {run}", phases, sign, most)


def _kill(run: str, phases: str, sign: str, most: int = 15) -> Torture:
    return Torture("kill sweep", f"SIGKILL of all | {run}", phases, sign, most)


def _errors(fault: str, run: str, phases: str, sign: str, most: int = 15) -> Torture:
    return Torture("disk errors", f"{fault} | {run}", phases, sign, most)


def _zombie(run: str, phases: str, sign: str, most: int = 15) -> Torture:
    return Torture("zombies", f"SIGSTOP past a takeover | {run}", phases, sign, most)


def _tests(technique: str, *nodes: str, sign: str) -> Tests:
    return Tests(technique, nodes, sign)


def _traced(case: str, sign: str) -> Tests:
    node = f"crash/test_power_loss.py::test_the_disk_can_answer_for_every_state_of_a_save[{case}]"
    return Tests(_TRACED, (node,), sign)


def _ledger(row: str, sign: str) -> Tests:
    return Tests(_LEDGER, (f"crash/test_crash_ledger.py::{row}",), sign)


def _in_trouble(sign: str) -> Tests:
    node = "test_an_error_of_the_disk_fails_the_save_and_nothing_else[dcp overwrite-writer]"
    return Tests("disk errors", (f"crash/test_disk_errors.py::{node}",), sign)


def _failing_commit(case: str, sign: str) -> Tests:
    return Tests(
        "failing COMMIT", (f"crash/test_disk_errors.py::test_a_commit_of_the_journal_that_fails[{case}]",), sign
    )


def _taken_over(sign: str) -> Tests:
    node = "test_a_manager_that_is_taken_over_changes_no_row_and_no_name_of_others"
    return Tests("zombies", (f"manager/test_closing.py::{node}",), sign)


MUTANTS: tuple[Mutant, ...] = (
    # --- what is not synced --------------------------------------------------------------------
    Mutant(
        "shards-not-synced",
        "the writer does not sync the files that it writes",
        (
            Edit(
                "writers/worker.py",
                "    with durable.new_file(path, mode=mode) if file.own else durable.shared_file(path)"
                " as descriptor:\n",
                "    how = os.O_RDWR | (os.O_CREAT | os.O_EXCL if file.own else 0)\n"
                '    with open(os.open(path, how, 0o666), "r+b", buffering=0) as stream:\n'
                "        descriptor = stream.fileno()\n",
            ),
        ),
        (
            _posix("dcp steady | 1", "COMMITTED", _LOST, 15),
            _ext4("dcp steady | 1", "COMMITTED", _LOST, 15),
            _traced("dcp-first", "torn if is_file"),
        ),
        writer=True,
    ),
    Mutant(
        "shards-synced-later",
        "the writer answers at once and syncs its files afterwards, in the background",
        (
            Edit(
                "durable.py",
                "        yield descriptor\n        os.fsync(descriptor)\n    except BaseException:\n",
                "        yield descriptor\n"
                "        import threading\n"
                "        import time\n"
                "        again = os.dup(descriptor)\n"
                "        threading.Thread(target=lambda: (time.sleep(0.5), os.fsync(again), os.close(again))).start()\n"
                "    except BaseException:\n",
            ),
        ),
        (
            _posix("hf first | 1", "COMMITTED", _LOST, 15),
            _ext4("hf first | 1", "COMMITTED", _LOST, 15),
            _traced("hf-first", "torn if is_file"),
        ),
        writer=True,
    ),
    Mutant(
        "shared-files-not-synced",
        "a rank does not sync its parts of a weight file that several ranks write",
        (
            Edit(
                "durable.py",
                "    with _synced(_open_only(path)) as descriptor:\n        yield descriptor\n",
                "    descriptor = _open_only(path)\n"
                "    try:\n        yield descriptor\n    finally:\n        os.close(descriptor)\n",
            ),
        ),
        (_posix("hf overwrite | 2", "COMMITTED", _LOST, 15), _ext4("hf overwrite | 2", "COMMITTED", _LOST, 15)),
        writer=True,
    ),
    Mutant(
        "small-files-not-synced",
        "rank 0 does not sync config, index and other small files",
        (
            Edit(
                "commit.py",
                "        durable.write_new(path, data, mode=self._rundir.permissions.file_mode)\n",
                "        path.write_bytes(data)\n",
            ),
        ),
        (
            _posix("hf steady | 1", "COMMITTED", _LOST, 15),
            _ext4("hf steady | 1", "COMMITTED", _LOST, 15),
            _traced("hf-steady", "torn if is_file"),
        ),
    ),
    Mutant(
        "manifest-not-synced",
        "GATHERED is recorded before the manifest is durable",
        (
            Edit(
                "rundir.py",
                "        durable.write_new(staging / MANIFEST_NAME, text, mode=self.permissions.file_mode)\n",
                "        (staging / MANIFEST_NAME).write_bytes(text)\n",
            ),
        ),
        (
            _posix("dcp first | 1", "COMMITTED", _LOST, 15),
            _ext4("dcp first | 1", "COMMITTED", _LOST, 15),
            _traced("dcp-first", _AT_GATHERED),
        ),
    ),
    Mutant(
        "staging-entries-not-synced",
        "the names in the staging directory are not synced before GATHERED",
        (Edit("rundir.py", "        durable.sync_directories(staging)\n", ""),),
        (_posix("dcp first | 1", "COMMITTED", _LOST, 15), _traced("dcp-steady", _AT_GATHERED)),
    ),
    Mutant(
        "nested-entries-not-synced",
        "of a checkpoint with folders in it only the topmost directory is synced",
        (
            Edit(
                "durable.py",
                "    for directory, _, _ in os.walk(root, topdown=False, onerror=refuse):\n"
                "        sync_directory(Path(directory))\n",
                "    sync_directory(root)\n",
            ),
        ),
        (_posix("hf first | 1", "COMMITTED", _LOST, 15), _traced("hf-first", _AT_GATHERED)),
    ),
    Mutant(
        "staging-not-synced",
        "the staging directory is made and its name is not synced before ranks write into it",
        (
            Edit(
                "durable.py",
                "        _make_directory(folder, name, mode)\n    sync_directory(path.parent)\n",
                "        _make_directory(folder, name, mode)\n",
            ),
        ),
        (_traced("dcp-first", "assert disk.after_power_loss"),),
    ),
    Mutant(
        "publish-not-synced",
        "COMMITTED is recorded before the rename to the final name is durable",
        (
            Edit(
                "rundir.py",
                "            durable.rename_new(staging, self._inside(replaces.retired_directory))\n"
                "        durable.sync_directory(final.parent)\n",
                "            durable.rename_new(staging, self._inside(replaces.retired_directory))\n",
            ),
        ),
        (_posix("dcp first | 1", "COMMITTED PROJECTION", _LOST, 80), _traced("hf-first", _AT_COMMITTED)),
    ),
    Mutant(
        "exchange-not-synced",
        "an overwrite renames the old directory twice without a sync in between",
        (
            Edit(
                "rundir.py",
                "            durable.sync_directory(final.parent)\n"
                "            durable.rename_new(staging, self._inside(replaces.retired_directory))\n",
                "            durable.rename_new(staging, self._inside(replaces.retired_directory))\n",
            ),
        ),
        (_posix("dcp overwrite | 1", "RENAME", _LOST, 100),),
    ),
    Mutant(
        "aside-not-synced",
        "where names cannot be swapped the old directory is set aside and that is not synced",
        (
            Edit(
                "rundir.py",
                "                    self._move_aside(replaces)\n"
                "                    durable.sync_directory(final.parent)\n",
                "                    self._move_aside(replaces)\n",
            ),
        ),
        (_posix("hf overwrite-aside | 1", "RENAME", _LOST),),
    ),
    Mutant(
        "retired-name-not-synced",
        "a checkpoint is removed before the rename to its retired name is durable",
        (
            Edit(
                "rundir.py",
                "            durable.sync_directory(path.parent)\n        if path.parent.is_dir():\n",
                "            pass\n        if path.parent.is_dir():\n",
            ),
        ),
        (_posix("dcp steady | 1", "DELETION", _LOST, 100), _traced("dcp-steady", "half of it would come back")),
    ),
    Mutant(
        "removal-not-synced",
        "a row says that its directory is gone before the removal is durable",
        (
            Edit(
                "durable.py",
                "                tries += 1\n    sync_directory(path.parent)\n",
                "                tries += 1\n",
            ),
        ),
        (
            _traced("dcp-steady", "assert disk.names_after_power_loss"),
            _tests(
                _TRACED,
                "crash/test_power_loss.py::test_a_failed_row_is_written_when_its_directory_can_no_longer_come_back[dcp]",
                sign="assert disk.after_power_loss",
            ),
        ),
    ),
    # --- the commit order ----------------------------------------------------------------------
    Mutant(
        "failed-before-removed",
        "FAILED is recorded, then the staging directory is removed",
        (
            Edit(
                "commit.py",
                "        try:\n            self._rundir.remove(attempt.record.staging_directory)\n",
                "        try:\n"
                "            attempt.lifecycle.fail(reason=reason, failures=facts)\n"
                "            self._rundir.remove(attempt.record.staging_directory)\n"
                "            return\n",
            ),
        ),
        (
            _tests(
                _TRACED,
                "crash/test_power_loss.py::test_a_failed_row_is_written_when_its_directory_can_no_longer_come_back[hf]",
                sign="assert disk.after_power_loss",
            ),
        ),
    ),
    Mutant(
        "commit-before-rename",
        "COMMITTED is recorded before the directory has its final name",
        (
            Edit("commit.py", "            self._rundir.publish(record, replaces)\n", ""),
            Edit(
                "commit.py",
                "                self._note_commit(record, planned)\n",
                "                self._rundir.publish(record, replaces)\n"
                "                self._note_commit(record, planned)\n",
            ),
        ),
        (
            _kill("dcp first | 1", "COMMITTED RENAME GATHERED", "before anything is recovered", 60),
            _traced("dcp-first", "does not exist"),
        ),
    ),
    Mutant(
        "gathered-before-manifest",
        "GATHERED is recorded before the manifest is written",
        (
            Edit(
                "commit.py",
                "            digest = self._rundir.seal(record, manifest)\n",
                "            digest = Digest(manifest.to_json().encode()).text\n",
            ),
            Edit(
                "commit.py",
                "            gathered = True\n",
                "            self._rundir.seal(record, manifest)\n            gathered = True\n",
            ),
        ),
        (
            _kill("dcp first | 1", "GATHERED", "set_aside"),
            _traced("hf-first", "assert disk.at\\(manifest\\)|assert None"),
        ),
    ),
    Mutant(
        "publish-before-gathered",
        "the directory gets its final name before GATHERED is recorded",
        (
            Edit("commit.py", "            self._rundir.publish(record, replaces)\n", ""),
            Edit(
                "commit.py",
                "            attempt.lifecycle.gather(\n",
                "            self._rundir.publish(record, None)\n            attempt.lifecycle.gather(\n",
            ),
        ),
        (
            _kill("dcp first | 1", "RENAME GATHERED COMMITTED", "names - aside"),
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_saving[GATHERED-with-a-complete-staging-directory]",
                sign="'final' == 'staging'|== row.new",
            ),
        ),
    ),
    Mutant(
        "retire-before-commit",
        "what a save lets go is deleted before that save is COMMITTED",
        (
            Edit(
                "commit.py",
                "                attempt.lifecycle.commit(\n",
                "                for gone in planned.plan.drop:\n"
                "                    self._rundir.retire(gone.record)\n"
                "                attempt.lifecycle.commit(\n",
            ),
        ),
        (
            _kill("dcp steady | 1", "GATHERED RENAME COMMITTED", "names|recovered"),
            _traced("dcp-steady", "allowed|half of it|not in"),
        ),
    ),
    Mutant(
        "meta-before-commit",
        "meta.json names a checkpoint before it is COMMITTED",
        (
            Edit(
                "commit.py",
                "                planned = self._planned(attempt, job.keep)\n",
                "                planned = self._planned(attempt, job.keep)\n"
                "                live = self._journal.checkpoints(live_only=True)\n"
                "                newest = dataclasses.replace(record, commit_seq=1 << 40)\n"
                "                self._rundir.write_meta(self._journal.run_id, [*live, newest], self._series)\n",
            ),
        ),
        (
            _kill("dcp first | 1", "COMMITTED GATHERED", "meta.json"),
            _traced("dcp-first", "meta.json or the link changed"),
        ),
    ),
    Mutant(
        "meta-in-place",
        "meta.json is overwritten in place, so that a reader or a crash finds half of it",
        (
            Edit(
                "durable.py",
                "    temporary = path.with_name(scratch)\n    _remove_file(temporary)\n"
                "    write_new(temporary, data, mode=mode)\n    rename_over(temporary, path)\n",
                "    path.write_bytes(data)\n    sync_file(path)\n",
            ),
        ),
        (
            _errors("torn write, then SIGKILL", "dcp steady | 1", "PROJECTION", "meta.json"),
            _kill("dcp steady | 1", "PROJECTION", "meta.json"),
        ),
    ),
    # --- the journal ---------------------------------------------------------------------------
    Mutant(
        "cas-without-epoch",
        "a transition does not ask whether a newer epoch has taken the run over",
        (
            Edit(
                "journal/store.py",
                "            if (before.state, before.epoch) != (source, epoch):\n",
                "            if before.state != source:\n",
            ),
            Edit(
                "journal/store.py",
                "            self._require_epoch(connection, epoch, checkpoint_id)\n"
                "            if dest is COMMITTED:\n",
                "            if dest is COMMITTED:\n",
            ),
            Edit(
                "journal/store.py",
                "                    checkpoint.c.epoch == epoch,\n"
                "                    newest_epoch.scalar_subquery() == epoch,\n                )\n"
                "                .values(state=dest.value, **values)\n",
                "                )\n                .values(state=dest.value, **values)\n",
            ),
        ),
        (
            _tests(
                "zombies",
                "manager/test_closing.py::test_a_manager_that_is_taken_over_changes_no_row_and_no_name_of_others",
                sign=r"incomplete' != 'step-1'|DID NOT RAISE",
            ),
            _tests(
                "journal tests",
                "journal/test_journal_life.py::test_a_stale_epoch_cannot_move_a_checkpoint",
                sign="DID NOT RAISE",
            ),
        ),
    ),
    Mutant(
        "cas-without-state",
        "a transition does not ask in which state the row is",
        (
            Edit(
                "journal/store.py",
                "            if (before.state, before.epoch) != (source, epoch):\n",
                "            if before.epoch != epoch:\n",
            ),
            Edit("journal/store.py", "                    checkpoint.c.state == source.value,\n", ""),
        ),
        (
            _tests(
                "journal tests",
                "journal/test_journal_life.py::test_a_wrong_source_state_changes_nothing",
                sign="DID NOT RAISE|IntegrityError|state_moves",
            ),
        ),
    ),
    Mutant(
        "begin-without-epoch",
        "a manager that was taken over may begin a save",
        (
            Edit(
                "journal/store.py",
                "            self._require_epoch(connection, epoch, checkpoint_id=0)\n            busy =",
                "            busy =",
            ),
        ),
        (
            _tests(
                "journal tests",
                "journal/test_journal_life.py::test_begin_of_a_stale_epoch_changes_nothing",
                sign="DID NOT RAISE",
            ),
        ),
    ),
    Mutant(
        "publish-without-epoch",
        "nobody looks at the epoch before a directory gets its final name",
        (Edit("commit.py", "            self._check_epoch(record.id)\n            replaces", "            replaces"),),
        (
            _tests(
                "zombies",
                "manager/test_closing.py::test_a_manager_that_is_taken_over_changes_no_row_and_no_name_of_others",
                sign="step-2",
            ),
        ),
    ),
    Mutant(
        "delete-without-second-look",
        "a manager that comes too late deletes what another has put under the name of its old checkpoint",
        (
            Edit(
                "rundir.py",
                "        if self._attempt_at(record.retired_directory) != record.id:\n",
                "        if False:\n",
            ),
        ),
        (
            _zombie("dcp steady | 1", "DELETION", "."),
            _tests(
                "zombies",
                "crash/test_crash_ledger.py::test_a_manager_that_comes_too_late_deletes_nothing_live[no crash]",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "journal-not-durable",
        "the journal is opened with journal_mode=DELETE and synchronous=FULL, as SQLite does by default",
        (
            Edit(
                "journal/database.py",
                '            ("journal_mode", "PERSIST", "persist"),\n            ("synchronous", "EXTRA", 3),\n',
                '            ("journal_mode", "DELETE", "delete"),\n            ("synchronous", "FULL", 2),\n',
            ),
        ),
        (
            _posix("dcp steady | 1", "COMMITTED DELETION PROJECTION", _LOST, 100),
            _tests(
                "journal tests",
                "journal/test_journal_database.py::test_settings_hold_on_every_connection_of_reading_and_writing",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "commit-error-is-failure",
        "an error that COMMIT reports is taken for: not committed",
        (Edit("journal/writing.py", "                if now != mine:\n", "                if True:\n"),),
        (
            _tests(
                "failing COMMIT",
                "crash/test_disk_errors.py::test_a_commit_of_the_journal_that_fails[3-it-was-done-dcp overwrite]",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "commit-error-is-success",
        "an error that COMMIT reports is taken for: committed all the same",
        (Edit("journal/writing.py", "                if now != mine:\n", "                if False:\n"),),
        (
            _tests(
                "failing COMMIT",
                "crash/test_disk_errors.py::test_a_commit_of_the_journal_that_fails[4-nothing-was-done-hf steady]",
                sign="assert",
            ),
        ),
    ),
    # --- recovery ------------------------------------------------------------------------------
    Mutant(
        "recovery-rolls-forward-too-early",
        "recovery commits an attempt that is WRITING, because its directory looks whole",
        (
            Edit(
                "recovery.py",
                "        lifecycle = self._adopt(action.record)\n        # The directory goes before the row",
                "        lifecycle = self._adopt(action.record)\n"
                "        try:\n"
                "            manifest, digest = self._rundir.read_manifest(action.record.staging_directory)\n"
                "            seen = self._rundir.verify(action.record.staging_directory, manifest.files, digests=0)\n"
                "            if seen == ():\n"
                "                lifecycle.gather(manifest_digest=digest, files=manifest.files, bytes=manifest.bytes)\n"
                "                self._rundir.publish(action.record, None)\n"
                "                lifecycle.commit()\n"
                "                return\n"
                "        except Exception:\n"
                "            pass\n"
                "        # The directory goes before the row",
            ),
        ),
        (
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_saving[WRITING-with-a-durable-manifest]",
                sign="'COMMITTED'.* == .*'FAILED'",
            ),
        ),
    ),
    Mutant(
        "recovery-rolls-gathered-back",
        "recovery does not publish an attempt that is GATHERED",
        (
            Edit(
                "recovery.py",
                "                if self._intact(record, record.staging_directory) or published:\n",
                "                if published:\n",
            ),
        ),
        (
            _kill("dcp first | 1", "RENAME GATHERED", "set_aside"),
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_saving[GATHERED-with-a-complete-staging-directory]",
                sign="set_aside|COMMITTED",
            ),
        ),
    ),
    Mutant(
        "recovery-leaves-retirements",
        "recovery does not finish a deletion that was begun",
        (
            Edit(
                "recovery.py",
                "            if record.state is S.COMMITTED and not record.is_live and record.retired_at is None:\n",
                "            if False:\n",
            ),
        ),
        (
            _kill("dcp steady | 1", "DELETION PROJECTION", "retire_started_at|names"),
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_saving[COMMITTED-and-retiring-under-its-final-name]",
                sign="retire_started_at|names",
            ),
        ),
    ),
    Mutant(
        "recovery-does-not-restore",
        "recovery leaves a committed checkpoint where a failed overwrite has set it aside",
        (
            Edit(
                "recovery.py",
                "            if self._holds(record, path):\n                self._take([path])\n",
                "            if False:\n                self._take([path])\n",
            ),
        ),
        (
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_recovering[a-live-checkpoint-stands-aside-and-its-name-is-free-dcp-overwrite]",
                sign="assert|die",
            ),
        ),
    ),
    Mutant(
        "recovery-fails-before-it-removes",
        "recovery records FAILED, then removes the directory",
        (
            Edit(
                "recovery.py",
                "        for path in action.remove:\n            self._rundir.remove(path)\n"
                "        # Crash here: in flight without a directory; recovery rolls it back.\n"
                "        lifecycle.fail(reason=action.reason)\n",
                "        lifecycle.fail(reason=action.reason)\n        for path in action.remove:\n"
                "            self._rundir.remove(path)\n",
            ),
        ),
        (
            _tests(
                _TRACED,
                "crash/test_power_loss.py::test_recovery_does_the_disk_first_and_syncs_it"
                "[dcp steady-WRITING with a durable manifest-FAILED]",
                sign="assert disk.after_power_loss",
            ),
        ),
    ),
    Mutant(
        "recovery-verifies-sizes",
        "recovery looks at the sizes of a GATHERED attempt instead of its digests",
        (
            Edit(
                "recovery.py",
                "    found = rundir.listing(journal.series(), deep_for=deep_for, unread=quiet)\n",
                "    found = rundir.listing(journal.series(), sizes_for=deep_for, unread=quiet)\n",
            ),
        ),
        (
            _tests(
                _LEDGER,
                "crash/test_crash_ledger.py::test_crash_while_recovering[GATHERED-without-any-copy-dcp-steady]",
                sign="assert|die",
            ),
        ),
    ),
    # --- names and deletion --------------------------------------------------------------------
    Mutant(
        "publish-over-something",
        "a directory gets its final name by a plain rename, which takes the place of an empty directory",
        (
            Edit(
                "durable.py",
                "    if _renameat2(source, target, _RENAME_NOREPLACE):\n        return True\n"
                "    if os.path.lexists(target):\n"
                '        raise FileExistsError(errno.EEXIST, "the final name is taken", str(target))\n',
                "",
            ),
        ),
        (
            _tests(
                "rename tests",
                "rundir/test_durable.py::test_a_rename_never_takes_a_name_that_is_taken_even_by_an_empty_directory",
                sign="DID NOT RAISE|NotADirectoryError",
            ),
        ),
    ),
    Mutant(
        "deletion-follows-links",
        "a path of the run directory may lead through a link to somewhere else",
        (
            Edit("rundir.py", "            if here.is_symlink():\n", "            if False:\n"),
            Edit("reach.py", "os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC\n", "os.O_DIRECTORY | os.O_CLOEXEC\n"),
        ),
        (
            _tests(
                "hostile input",
                "rundir/test_run_directory.py::test_a_link_on_the_way_is_never_followed",
                sign="DID NOT RAISE",
            ),
        ),
    ),
    Mutant(
        "lock-file-removed",
        "the run lock's file is removed when it is released, so that two can hold it",
        (
            Edit(
                "rundir.py",
                "            self._lock.release()\n",
                "            self._lock.release()\n            self.lock_path.unlink(missing_ok=True)\n",
            ),
        ),
        (_tests("lock tests", "rundir/test_run_directory.py", "manager/test_closing.py", sign="assert"),),
    ),
    Mutant(
        "retention-drops-newest",
        "retention protects the newest checkpoint only where a rule does",
        (Edit("retention.py", "        if position == 0:\n", "        if position == 0 and reasons:\n"),),
        (_tests("retention tests", "retention/test_retention.py", sign="assert|KeyError|Falsifying"),),
    ),
    Mutant(
        "epoch-starts-again",
        "after the journal was rebuilt, epochs start from 1 again",
        (
            Edit(
                "journal/store.py",
                "            number = self._next(max(self._scalar(connection, newest_epoch), after))\n",
                "            number = self._next(self._scalar(connection, newest_epoch))\n",
            ),
        ),
        (_tests("rebuild tests", "recovery/test_rebuild.py", "cli/test_cli_recover.py", sign="assert"),),
    ),
    # --- writers and ranks ---------------------------------------------------------------------
    Mutant(
        "fsync-tried-again",
        "an fsync that failed is tried a second time",
        (
            Edit(
                "durable.py",
                "        yield descriptor\n        os.fsync(descriptor)\n    except BaseException:\n",
                "        yield descriptor\n        try:\n            os.fsync(descriptor)\n        except OSError:\n"
                "            os.fsync(descriptor)\n    except BaseException:\n",
            ),
        ),
        (
            _errors("EIO once", "dcp steady | 1", "SHARDS GATHERED", "synced again|a save went on after", 80),
            _in_trouble("an error was ignored"),
        ),
        writer=True,
    ),
    Mutant(
        "close-error-ignored",
        "an error that close reports is ignored",
        (
            Edit(
                "durable.py",
                "        raise\n    os.close(descriptor)\n",
                "        raise\n    with contextlib.suppress(OSError):\n        os.close(descriptor)\n",
            ),
        ),
        (_errors("EIO at close", "dcp steady | 1", "SHARDS GATHERED", "."),),
        writer=True,
    ),
    Mutant(
        "write-error-ignored",
        "the writer goes on after a write that failed",
        (
            Edit(
                "writers/worker.py",
                "                durable.write_at(descriptor, chunk, piece.file_offset)\n",
                "                with contextlib.suppress(OSError):\n"
                "                    durable.write_at(descriptor, chunk, piece.file_offset)\n",
            ),
        ),
        (
            _errors("EIO once", "dcp steady | 1", "SHARDS", "a save went on after|was acknowledged with", 60),
            _in_trouble("acknowledged"),
        ),
        writer=True,
    ),
    Mutant(
        "short-write-not-continued",
        "a write that the kernel cut short is not continued",
        (Edit("durable.py", "        offset += written\n        data = data[written:]\n", "        break\n"),),
        (_errors("short write", "dcp steady | 1", "SHARDS PREWRITTEN GATHERED", "was acknowledged with"),),
        writer=True,
    ),
    Mutant(
        "silent-rank-is-fine",
        "a rank that says nothing is taken for one that has written all",
        (
            Edit(
                "finalizer.py",
                "            if rank not in answers:\n",
                "            if rank not in answers:\n                continue\n            if rank not in answers:\n",
            ),
        ),
        (
            Torture(
                "kill sweep",
                "SIGKILL of one rank | hf overwrite | 2 | rank 1",
                "PREWRITTEN WRITING SHARDS",
                "it was {1} that died|was told that|names|acknowledged",
                10,
            ),
            _tests(
                "rank failures",
                "distributed/test_rank_failures.py::test_a_trainer_that_stops_is_named_silent_on_every_rank_and_the_next_save_commits[2]",
                sign=".",
            ),
        ),
    ),
    Mutant(
        "late-message-accepted",
        "a message of an earlier save is taken for one of this save",
        (Edit("ranks.py", "        if found == number and stage in stages:\n", "        if stage in stages:\n"),),
        (
            _tests(
                "rank failures",
                "distributed/test_messages.py::test_a_message_of_an_earlier_save_is_passed_over",
                sign="save 2 is written",
            ),
        ),
    ),
    Mutant(
        "writer-replaced-without-memory",
        "a writer that died is replaced by one that has not got the bytes, and what it lacks is left zero",
        (
            Edit(
                "writers/process.py",
                "        if self._pipe is None:\n            return Answer",
                "        if self.pid is None:\n            self.start(timeout_s)\n        if self._pipe is None:\n"
                "            return Answer",
            ),
            Edit(
                "writers/worker.py",
                "        if segment.arena_offset + segment.length * segment.count > has:\n",
                "        if False:\n",
            ),
        ),
        (_tests("writer tests", "writers/test_writer_process.py", sign="."),),
        writer=True,
    ),
    Mutant(
        "read-back-skipped",
        "weight files that several ranks wrote are recorded with a digest of nothing",
        (
            Edit(
                "writers/worker.py",
                "                digest.update(buffer[:count])\n                size += count\n",
                "                size += count\n",
            ),
        ),
        (_posix("hf overwrite | 2", "COMMITTED", "digest:", 3),),
        writer=True,
    ),
    # --- resume and check ----------------------------------------------------------------------
    Mutant(
        "resume-by-listing",
        "resume takes every directory with a final or staging name for a checkpoint",
        (
            Edit(
                "restore.py",
                "        path = self._rundir.absolute(record.directory)\n        metrics =",
                "        found = self._rundir.listing([record.series])\n"
                "        listed = max((one for one in found if one.step is not None), key=lambda one: one.step or 0)\n"
                "        record = dataclasses.replace(record, step=listed.step, directory=listed.path)\n"
                "        path = self._rundir.absolute(record.directory)\n        metrics =",
            ),
        ),
        (
            _tests(
                "classic bugs",
                "manager/test_saving.py::test_foreign_and_half_written_directories_never_matter_and_stay",
                sign=".",
            ),
        ),
    ),
    Mutant(
        "resume-takes-retiring",
        "a checkpoint that is being deleted may be resumed from",
        (
            Edit(
                "lifecycle.py",
                "        return self.state is CheckpointState.COMMITTED and self.retire_started_at is None\n",
                "        return self.state is CheckpointState.COMMITTED and self.retired_at is None\n",
            ),
        ),
        (
            _tests(
                "resume tests",
                "resume/test_resume.py::test_a_retiring_checkpoint_is_no_candidate_although_it_is_intact",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "deep-check-is-shallow",
        "`check --deep` compares sizes only",
        (
            Edit(
                "cli/check.py",
                "journal.files(record.id), digests=True, progress=read, from_disk=True",
                "journal.files(record.id), digests=False, progress=read, from_disk=True",
            ),
        ),
        (_tests("bit rot", "cli/test_cli_check.py", sign="assert"),),
    ),
    # --- requests and adoption -----------------------------------------------------------------
    Mutant(
        "request-outlives-its-command",
        "a request is carried out although the command that asked has died",
        (
            Edit(
                "requests.py",
                "        return now <= self.deadline and may_run(self.host, self.pid)\n",
                "        return now <= self.deadline\n",
            ),
        ),
        (
            _tests(
                "requests",
                "manager/test_requests.py::test_what_nobody_waits_for_is_never_carried_out[of a dead command]",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "request-to-an-earlier-manager",
        "a manager carries out what an earlier one was asked",
        (
            Edit(
                "commit.py",
                "            if request.epoch < self._epoch or not request.is_wanted(time.time()):\n",
                "            if not request.is_wanted(time.time()):\n",
            ),
        ),
        (
            _tests(
                "requests",
                "manager/test_requests.py::test_what_nobody_waits_for_is_never_carried_out[to an older epoch]",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "withdrawn-and-taken",
        "a command believes that it has withdrawn what the manager has taken",
        (
            Edit(
                "requests.py",
                '        durable.rename_new(folder / f"{id}.asked", folder / f".{id}.withdrawn")\n'
                "    except FileNotFoundError:\n        return False\n",
                '        durable.rename_new(folder / f"{id}.asked", folder / f".{id}.withdrawn")\n'
                "    except FileNotFoundError:\n        return True\n",
            ),
        ),
        (_tests("requests", "manager/test_requests.py::test_of_taking_and_withdrawing_one_happens", sign="assert"),),
    ),
    Mutant(
        "prune-takes-what-was-resumed-from",
        "a prune that is asked for lets go what was resumed from, and nothing has superseded it",
        (
            Edit(
                "commit.py",
                "            protected[self._resumed[request.series]] = requests.RESUMED\n",
                "            pass\n",
            ),
        ),
        (
            _tests(
                "requests",
                "manager/test_requests.py::test_what_was_resumed_from_stays_until_it_is_superseded",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "told-of-damage-and-deaf",
        "a manager that is told of a damaged checkpoint records it as intact",
        (
            Edit(
                "requests.py",
                "        found.append(Verified(id, ok, tuple(texts), after))\n",
                "        found.append(Verified(id, True))\n",
            ),
        ),
        (
            _tests(
                "requests",
                "manager/test_requests.py::test_what_was_verified_is_recorded_and_the_log_names_the_damage",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "adopted-while-it-changed",
        "a file that has changed while it was read is adopted",
        (
            Edit(
                "adoption.py",
                "    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)"
                " or after.st_size != size:\n",
                "    if after.st_size != size:\n",
            ),
        ),
        (
            _tests(
                "adoption",
                "foreign/test_adopt.py::test_a_file_that_changes_while_it_is_read_is_not_committed[False]",
                sign="assert 0 == 5",
            ),
        ),
    ),
    Mutant(
        "adopted-with-other-bytes",
        "a copy of our own is adopted with other bytes than its manifest says",
        (
            Edit(
                "adoption.py",
                "    if digest.text != source.digests.get(name, digest.text):\n",
                "    if False:\n",
            ),
        ),
        (
            _tests(
                "adoption",
                "foreign/test_adopt.py::test_a_copy_of_our_own_with_other_bytes_is_not_committed",
                sign="assert 0 == 5",
            ),
        ),
    ),
    Mutant(
        "adopted-before-what-there-is",
        "an older step is adopted into a run that has a later one, and it goes on from there",
        (
            Edit(
                "adoption.py",
                "    if live and source.step < live[-1].step and not by_name:\n",
                "    if False:\n",
            ),
        ),
        (
            _tests(
                "adoption",
                "foreign/test_adopt.py::test_an_older_step_is_not_put_before_what_the_run_has",
                sign="assert",
            ),
        ),
    ),
    Mutant(
        "outline-without-retirement",
        "the outline of the attempts does not say which have been retired",
        (Edit("journal/seal.py", '        "({row}.retired_at IS NULL)",\n', ""),),
        (
            _tests(
                "journal tests",
                "journal/test_journal_seal.py::"
                "test_a_reader_finds_at_once_what_makes_it_choose_another_attempt[retired_at]",
                sign="DID NOT RAISE",
            ),
        ),
    ),
    Mutant(
        "rows-not-compared-when-read",
        "a reader that has found the outline right compares no whole row",
        (
            Edit(
                "journal/questions.py",
                '        if self.read_only:\n            database.require_intact(connection, self.path, ["checkpoint"]',
                '        if False:\n            database.require_intact(connection, self.path, ["checkpoint"]',
            ),
        ),
        (
            _tests(
                "journal tests",
                "journal/test_journal_seal.py::test_what_else_an_attempt_says_a_reader_compares_when_it_reads_it",
                sign="DID NOT RAISE",
            ),
        ),
    ),
)
