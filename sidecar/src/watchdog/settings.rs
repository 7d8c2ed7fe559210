//! What of-watchdog's variables say. They have no prefix: function owners and templates know them by these names.

use std::time::Duration;

use http::uri::Authority;

use crate::config::{Start, read, read::Reader};

/// Longest duration that makes sense here.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);
/// What of-watchdog takes where nothing is said.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// How the front behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogSettings {
    /// `port`: where clients come.
    pub port: u16,
    /// What stands behind `--`, or `function_process`, or `fprocess`: the handler's command; empty: there is none.
    pub command: Vec<String>,
    /// `http_upstream_url`, or `upstream_url`: where the handler listens.
    pub upstream: Option<Authority>,
    /// `exec_timeout`: how long a request may take; `None`: as long as it likes.
    pub exec_timeout: Option<Duration>,
    /// `write_timeout`: how long requests in flight may go on once no new ones are taken.
    pub write_timeout: Duration,
    /// `healthcheck_interval`: how long new requests are taken after SIGTERM.
    pub healthcheck_interval: Duration,
    /// `max_inflight`: requests in work before 429; `None`: no limit but the sidecar's own.
    pub max_inflight: Option<usize>,
    /// `ready_path`: whom to ask at the handler whether it is ready.
    pub ready_path: Option<String>,
    /// `suppress_lock`: no lock file.
    pub suppress_lock: bool,
}

#[derive(Clone, Copy)]
enum Mode {
    Watchdog,
    Side,
}

impl WatchdogSettings {
    /// `None`: the sidecar is a side service, or something is wrong, which the reader has noted.
    pub(crate) fn read(from: &mut Reader, start: &Start) -> Option<Self> {
        let command = match start.command.as_slice() {
            [] => {
                start.variable("function_process").or_else(|| start.variable("fprocess")).map_or_else(Vec::new, words)
            }
            given => given.to_vec(),
        };
        match from.one_of("mode", &[("watchdog", Mode::Watchdog), ("side", Mode::Side)]) {
            Some(Mode::Side) => return None,
            None if command.is_empty() => return None,
            Some(Mode::Watchdog) | None => {}
        }
        let mut variables = Variables { from, start };
        variables.refuse_other_modes();
        let upstream = variables.parse("http_upstream_url", read::upstream);
        let upstream = upstream.or_else(|| variables.parse("upstream_url", read::upstream));
        if !command.is_empty() && upstream.is_none() && start.variable("FAASWAP_UPSTREAM").is_none() {
            variables.from.mistake("upstream_url is not set: where does the handler listen?".to_owned());
        }
        let write_timeout = variables.duration("write_timeout").unwrap_or(TIMEOUT_DEFAULT);
        // Known to of-watchdog; here bodies have limits of their own, so only nonsense is noticed.
        let _read_timeout = variables.duration("read_timeout");
        Some(Self {
            port: variables.number("port").unwrap_or(8080),
            command,
            upstream,
            exec_timeout: Some(variables.duration("exec_timeout").unwrap_or(TIMEOUT_DEFAULT)).filter(|t| !t.is_zero()),
            write_timeout,
            healthcheck_interval: variables.duration("healthcheck_interval").unwrap_or(write_timeout),
            max_inflight: variables.number("max_inflight").filter(|max| *max > 0),
            ready_path: variables.parse("ready_path", path),
            suppress_lock: variables.parse("suppress_lock", flag).unwrap_or(false),
        })
    }
}

/// Variables without our prefix; mistakes go to the same list.
struct Variables<'a> {
    from: &'a mut Reader,
    start: &'a Start,
}

impl Variables<'_> {
    fn parse<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.start.variable(name)?;
        parse(text).map_err(|why| self.from.mistake(format!("{name}: {why}"))).ok()
    }

    fn number<T: std::str::FromStr>(&mut self, name: &str) -> Option<T> {
        self.parse(name, |text| text.parse().map_err(|_| format!("'{text}' is no number that fits here")))
    }

    fn duration(&mut self, name: &str) -> Option<Duration> {
        self.parse(name, |text| {
            let time = duration(text).filter(|time| *time <= DURATION_MAX);
            time.ok_or_else(|| format!("'{text}' is no duration such as 90s, 1m30s or 90, of 24h at most"))
        })
    }

    fn refuse_other_modes(&mut self) {
        let _http = self.parse("mode", |mode| match mode {
            "http" => Ok(()),
            other => Err(format!("'{other}' is not offered: the handler must be an HTTP server (mode=http)")),
        });
    }
}

fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}

fn path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && text.parse::<http::uri::PathAndQuery>().is_ok();
    if is_path { Ok(text.to_owned()) } else { Err(format!("'{text}' is no path such as /ready")) }
}

fn flag(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        other => Err(format!("'{other}' is neither true nor false")),
    }
}

/// Whole seconds, or a duration as Go writes it: numbers with units, such as `1m30s`, `1.5h`, `250ms`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (amount, tail) = rest.split_at(number);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(amount.parse::<f64>().ok()? * seconds).ok()?;
        sum = sum.checked_add(part)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, ms) in [("30", 30_000), ("0", 0), ("1m30s", 90_000), ("1.5h", 5_400_000), ("250ms", 250)] {
            assert_eq!(duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "s", "1", "-1s", "1x", "1.2.3s", "1s1", "9e99h", "99999999999999999999s"] {
            assert_eq!(duration(bad).filter(|_| bad != "1"), None, "{bad}");
        }
    }
}
