//! Shards that a shell command writes.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{DataError, Result};
use crate::sink::Sink;

/// A command that writes nothing for this long is ended. Longer than a server is waited for, since a command may have
/// much to do before its first byte.
const STALL_TIMEOUT: Duration = Duration::from_secs(600);
/// How often a command that writes nothing any more is asked whether it has ended.
const EXIT_POLL: Duration = Duration::from_millis(5);
/// What it left behind may keep what it says open, so that its end is not seen.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes that are read from a command at a time.
const CHUNK: usize = 1 << 16;
/// Chunks that are read ahead of who takes them.
const AHEAD: usize = 4;
/// Bytes of the end of what a command says that are looked at for its last line.
const LAST_WORDS: usize = 1 << 12;

/// Runs a shell command and hands what it writes to `sink`. `name` is what errors call it.
///
/// # Errors
/// Those of `sink`, or what became of the command.
pub(crate) fn run(name: &str, command: &str, sink: Sink) -> Result<()> {
    run_for(name, command, STALL_TIMEOUT, sink)
}

fn run_for(name: &str, command: &str, stall: Duration, sink: Sink) -> Result<()> {
    let failed = |error: io::Error| DataError::fetch(name, error.to_string());
    let mut child = Command::new("sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // So that all that it starts can be ended with it.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    // Threads read, since a channel can be waited for with a limit. A command waits until what it says is read as well.
    let (give, chunks) = mpsc::sync_channel(AHEAD);
    thread::spawn(move || out.map(|out| read_chunks(out, |chunk| give.send(chunk).is_ok())));
    let (say, said) = mpsc::channel();
    thread::spawn(move || say.send(err.map(last_line).unwrap_or_default()));

    let mut hear = || loop {
        match chunks.recv_timeout(stall) {
            Ok(chunk) => sink(&chunk.map_err(failed)?)?,
            Err(RecvTimeoutError::Disconnected) => return exit_within(&mut child, stall).map_err(failed),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
        }
    };
    let heard = hear();
    if !matches!(heard, Ok(Some(_))) {
        end_group(&mut child);
    }
    let reason = match heard? {
        Some(status) if status.success() => return Ok(()),
        Some(status) => format!("the command ended with {status}"),
        None => format!("the command wrote nothing for {} s and was ended", stall.as_secs_f64()),
    };
    let said = match said.recv_timeout(LAST_WORDS_TIMEOUT).unwrap_or_default() {
        said if said.is_empty() => "it said nothing".to_owned(),
        said => format!("it said {said:?}"),
    };
    Err(DataError::fetch(name, format!("{reason}; {said}")))
}

/// How a command ended that writes nothing any more, `None` where it does not end in time.
fn exit_within(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        match child.try_wait()? {
            None if start.elapsed() < limit => thread::sleep(EXIT_POLL),
            status => return Ok(status),
        }
    }
}

/// Ends a command that was not waited for, and all that it started.
fn end_group(child: &mut Child) {
    // A number below zero is that of a group; the standard library ends single processes only.
    let kill = format!("kill -s KILL -- -{}", child.id());
    // It may have ended by itself.
    let _ = Command::new("sh").arg("-c").arg(kill).stderr(Stdio::null()).status();
    let _ = child.wait();
}

/// Gives what is read, chunk by chunk, until its end or until `give` says that nobody takes it.
fn read_chunks(mut from: impl Read, give: impl Fn(io::Result<Vec<u8>>) -> bool) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let chunk = match from.read(&mut buffer) {
            Ok(0) => return,
            read => read.map(|read| buffer[..read].to_vec()),
        };
        if !give(chunk) {
            return;
        }
    }
}

/// The last line that is not blank.
fn last_line(mut from: impl Read) -> String {
    let mut end = Vec::new();
    let mut chunk = [0; LAST_WORDS];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        end.extend_from_slice(&chunk[..read]);
        end.drain(..end.len().saturating_sub(LAST_WORDS));
    }
    let text = String::from_utf8_lossy(&end);
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn output_for(command: &str, stall: Duration) -> Result<String> {
        let mut bytes = Vec::new();
        run_for(&format!("pipe:{command}"), command, stall, &mut |chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(String::from_utf8(bytes).unwrap())
    }

    fn output(command: &str) -> Result<String> {
        output_for(command, STALL_TIMEOUT)
    }

    #[test]
    fn a_command_gives_its_bytes_or_why_it_does_not() {
        assert_eq!(output("printf 'a b' | tr b c").unwrap(), "a c");
        let error = |command| output(command).unwrap_err().to_string();
        assert_eq!(
            error("echo half; echo one >&2; echo ' two ' >&2; echo >&2; exit 3"),
            "cannot fetch pipe:echo half; echo one >&2; echo ' two ' >&2; echo >&2; exit 3: \
             the command ended with exit status: 3; it said \"two\""
        );
        assert!(error("kill -9 $$").ends_with("ended with signal: 9 (SIGKILL); it said nothing"));
    }

    #[test]
    fn a_command_that_says_much_or_is_not_heard_to_its_end_is_no_hang() {
        assert_eq!(output("yes no | head -c 1000000 >&2; echo yes").unwrap(), "yes\n");
        let mut left = 3;
        let stopped = run("pipe:yes", "yes | cat", &mut |_| {
            left -= 1;
            if left == 0 { Err(DataError::Cache("full".to_owned())) } else { Ok(()) }
        });
        assert_eq!(stopped.unwrap_err().to_string(), "cache of shards: full");
    }

    #[test]
    fn a_command_that_stalls_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("heartbeat");
        let child = format!("(while :; do echo >> '{}'; sleep 0.05; done) | cat", file.display());
        let (stall, start) = (Duration::from_millis(300), Instant::now());
        for (command, said) in [
            (child.as_str(), "it said nothing"),
            ("sleep 1000 >&- 2>&-", "it said nothing"),
            ("while :; do echo alive >&2; sleep 0.1; done", "it said \"alive\""),
        ] {
            let error = output_for(command, stall).unwrap_err().to_string();
            let expected =
                format!("fetch pipe:{command}: the command wrote nothing for 0.3 s and was ended; {said}");
            assert!(error.ends_with(&expected), "{error}");
        }
        assert!(start.elapsed() < Duration::from_secs(100));
        let length = || fs::metadata(&file).unwrap().len();
        let before = length();
        thread::sleep(Duration::from_millis(300));
        assert_eq!(length(), before, "its children are gone as well");

        let slow = "for n in 1 2 3 4 5; do printf $n; sleep 0.1; done";
        assert_eq!(output_for(slow, stall).unwrap(), "12345", "slow is not stalled");
        let start = Instant::now();
        assert_eq!(output("echo all; sleep 20 >/dev/null &").unwrap(), "all\n");
        assert!(start.elapsed() < Duration::from_secs(15), "who is left behind is not waited for");
    }
}
