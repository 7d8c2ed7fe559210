//! What configurations mean, and what is said of bad ones.

use super::*;

fn load(text: &str, variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let library = format!("onnxruntime = \"{}\"\n", env!("CARGO_MANIFEST_DIR").to_owned() + "/Cargo.toml");
    Settings::from_parts(&(library + text), Environment::with_prefix("FAASWAP").source(Some(variables)))
}

#[test]
fn an_empty_configuration_takes_the_devices_that_are_there() {
    let settings = load("", &[]).expect("valid");
    assert_eq!((settings.devices, settings.devices_choice), (vec![], DevicesChoice::Auto));
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
        kind: DeviceKind::Host { link_mib_per_s: Some(200) },
        memory: Some(Bytes::mib(24)),
        chunk: Some(Bytes::kib(256)),
        lanes: 2,
    };
    assert_eq!(devices[0], first);
    assert_eq!(devices[1].name, "b");
}

#[test]
fn gpus_are_named_by_number_and_not_mixed_with_the_host() {
    let text = "policy = \"torpor\"\ngpu_memory = \"20GiB\"\ntf32 = false\nbind_by_kind = \"off\"\n[[device]]\nkind = \"gpu\"\n[[device]]\nkind = \"gpu\"\ngpu = 3\n\
                lanes = 8\nmemory = \"60GiB\"\nchunk = \"8MiB\"";
    let settings = load(text, &[("FAASWAP_GPU_MEMORY", "25GiB")]).expect("valid");
    assert_eq!((settings.gpu_memory, settings.tf32), (Some(Bytes::mib(25 << 10)), false));
    assert!(!settings.bind_by_kind && load("", &[]).expect("valid").bind_by_kind);
    assert_eq!(settings.policy, PolicyKind::Torpor);
    assert_eq!(settings.devices[0], DeviceSettings::gpu(0));
    let kind = DeviceKind::Gpu { ordinal: 3, reserve: cuda::RESERVE_DEFAULT };
    let (memory, chunk) = (Some(Bytes::mib(60 << 10)), Some(Bytes::mib(8)));
    assert_eq!(settings.devices[1], DeviceSettings { name: "cuda3".to_owned(), kind, memory, chunk, lanes: 8 });
    let bad = "devices = \"some\"\n[[device]]\n[[device]]\nkind = \"gpu\"\nchunk = \"1MiB\"\nlink_mib_per_s = 1";
    let all = load(bad, &[]).expect_err("invalid").0.join("\n");
    for expected in ["`some` is none of: auto, gpu, host", "of one kind", "multiple of 2.0 MiB", "link_mib_per_s is no"]
    {
        assert!(all.contains(expected), "{expected} in {all}");
    }
}

#[test]
fn a_trace_is_recorded_where_one_is_asked_for() {
    let trace = |text, variables: &[_]| {
        let settings = load(text, variables).expect("valid");
        (settings.trace, settings.trace_max)
    };
    assert_eq!(trace("", &[]).0, None);
    assert_eq!(trace("trace = \"/a\"", &[("FAASWAP_TRACE", "off")]).0, None);
    assert!(load("", &[]).expect("valid").prefetch && !load("prefetch = \"off\"", &[]).expect("valid").prefetch);
    let limited = trace("trace_max = \"3MiB\"", &[("FAASWAP_TRACE", "/b/trace")]);
    assert_eq!(limited, (Some(PathBuf::from("/b/trace")), Bytes::mib(3)));
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
