//! What configurations mean, and what is said of bad ones.

use super::*;

fn load(text: &str, variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let library = format!("onnxruntime = \"{}\"\n", env!("CARGO_MANIFEST_DIR").to_owned() + "/Cargo.toml");
    Settings::from_parts(&(library + text), Environment::with_prefix("FAASWAP").source(Some(variables)))
}

#[test]
fn an_empty_configuration_is_one_host_device() {
    let settings = load("", &[]).expect("valid");
    assert_eq!(settings.devices, [DeviceSettings::host0()]);
    assert_eq!(settings.tcp_listen, None);
    assert_eq!(settings.socket, Path::new("/run/faaswap/broker.sock"));
}

#[test]
fn the_environment_wins_over_the_file() {
    let settings =
        load("host_memory = \"1GiB\"\nkeep_warm = \"5m\"", &[("FAASWAP_HOST_MEMORY", "3 MiB")]).expect("valid");
    assert_eq!(settings.host_memory, Bytes::mib(3));
    assert_eq!(settings.keep_warm, Duration::from_secs(300));
}

#[test]
fn devices_are_read_in_order() {
    let text =
        "[[device]]\nmemory = \"24MiB\"\nchunk = \"256KiB\"\nlink_mib_per_s = 200\nlanes = 2\n[[device]]\nname = \"b\"";
    let devices = load(text, &[]).expect("valid").devices;
    assert_eq!(devices.len(), 2);
    let first = DeviceSettings {
        name: "host0".to_owned(),
        memory: Bytes::mib(24),
        chunk: Bytes::kib(256),
        link_mib_per_s: Some(200),
        lanes: 2,
    };
    assert_eq!(devices[0], first);
    assert_eq!(devices[1].name, "b");
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let text = "tcp_listen = \"nonsense\"\nsocket_mode = \"999\"\nhost_memory = \"many\"\nkeep_warm = \"soon\"\n\
                functions_max = 0\ncolour = \"red\"\n[[device]]\nchunk = 1000\nmemori = 3";
    let mistakes = load(text, &[]).expect_err("invalid").0;
    let all = mistakes.join("\n");
    for expected in ["tcp_listen:", "socket_mode:", "host_memory:", "keep_warm:", "functions_max:", "colour is no"] {
        assert!(all.contains(expected), "{expected} in {all}");
    }
    assert!(all.contains("memori is no setting") && all.contains("chunk must be a multiple"), "{all}");
    assert_eq!(mistakes.len(), 8, "{all}");
}

#[test]
fn sizes_are_read_exactly_and_overflow_is_a_mistake() {
    use super::read::parse_bytes;
    assert_eq!(parse_bytes("1.5GiB"), Ok(Bytes::mib(1536)));
    assert_eq!(parse_bytes("17"), Ok(Bytes::new(17)));
    for bad in ["", "MiB", "1.2.3MiB", "-1", "1 parsec", "99999999999TiB"] {
        assert!(parse_bytes(bad).is_err(), "{bad}");
    }
}
