use clap::Parser;

use super::{
    plan::{Family, Plan},
    *,
};

#[derive(Parser)]
struct P {
    #[command(flatten)]
    args: IptablesArgs,
}

fn plan(flags: &[&str]) -> anyhow::Result<Plan> {
    Plan::new(&P::parse_from(std::iter::once("x").chain(flags.iter().copied())).args)
}

fn v4(flags: &[&str]) -> String {
    xtables::restore(&plan(flags).unwrap().chains(), Family::V4)
}

fn v6(flags: &[&str]) -> String {
    xtables::restore(&plan(flags).unwrap().chains(), Family::V6)
}

fn nftables(flags: &[&str]) -> String {
    nft::ruleset(&plan(flags).unwrap().chains())
}

fn position(text: &str, what: &str) -> usize {
    text.lines().position(|l| l.contains(what)).unwrap_or_else(|| panic!("{what} is not in\n{text}"))
}

/// Every line of `before` comes before `after`.
fn ordered(text: &str, before: &[&str], after: &str) {
    let end = position(text, after);
    for b in before {
        assert!(position(text, b) < end, "{b:?} is not before {after:?} in\n{text}");
    }
}

const FLAGS: [&str; 6] = ["-x", "10.9.0.0/16,fd00::/8", "-o", "5432", "-d", "22"];

#[test]
fn the_proxy_is_exempt_before_anything_is_redirected() {
    let t = v4(&FLAGS);
    ordered(
        &t,
        &[
            "FLOTILLA_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN",
            "FLOTILLA_OUTPUT -m owner --uid-owner 1337 -j RETURN",
            "FLOTILLA_OUTPUT -m owner --gid-owner 1337 -j RETURN",
            "-d 127.0.0.1/32 -j RETURN",
            "FLOTILLA_OUTPUT -j FLOTILLA_CAPTURE",
            "-p tcp --dport 5432 -j RETURN",
            "-d 10.9.0.0/16 -j RETURN",
        ],
        "FLOTILLA_CAPTURE -p tcp -j REDIRECT --to-ports 15001",
    );
    ordered(
        &t,
        &["--dport 22 -j RETURN", "--dport 15008 -j RETURN"],
        "FLOTILLA_INBOUND -p tcp -j REDIRECT --to-ports 15006",
    );
    // Back through the mesh, before what exempts the proxy.
    ordered(
        &t,
        &["-o lo ! -d 127.0.0.1/32 -m owner --uid-owner 1337 -j REDIRECT --to-ports 15006"],
        "FLOTILLA_OUTPUT -m owner --uid-owner 1337 -j RETURN",
    );
    assert!(!t.contains("fd00") && !t.contains("::"), "an IPv6 range has no place in the IPv4 table");
    let t = v6(&FLAGS);
    assert!(t.contains("-d fd00::/8 -j RETURN") && t.contains("-d ::1/128 -j RETURN"), "{t}");
    assert!(!t.contains("10.9.0.0") && !t.contains("127.0.0"), "{t}");
}

#[test]
fn the_same_for_nft() {
    let t = nftables(&FLAGS);
    ordered(
        &t,
        &["tcp dport 5432 return", "ip daddr 10.9.0.0/16 return", "ip6 daddr fd00::/8 return"],
        "meta l4proto tcp redirect to :15001",
    );
    ordered(&t, &["tcp dport 22 return", "tcp dport 15006 return"], "meta l4proto tcp redirect to :15006");
    ordered(
        &t,
        &[
            "ip saddr 127.0.0.6/32 oifname \"lo\" return",
            "meta l4proto tcp oifname \"lo\" ip daddr != 127.0.0.1/32 meta skuid 1337 redirect to :15006",
            "meta skuid 1337 return",
            "meta skgid 1337 return",
            "ip6 daddr ::1/128 return",
        ],
        "jump FLOTILLA_CAPTURE",
    );
    ordered(&t, &["chain FLOTILLA_CAPTURE {"], "chain FLOTILLA_OUTPUT {");
    assert!(t.starts_with("table inet flotilla {}\ndelete table inet flotilla\n"), "{t}");
    for hook in ["nat_prerouting", "nat_output"] {
        assert!(t.contains(&format!("chain {hook} {{")), "{t}");
    }
}

#[test]
fn dns_comes_before_what_takes_every_port() {
    let t = v4(&["--dns-port", "15053", "--exclude-uids", "7"]);
    ordered(&t, &["OUTPUT -p tcp --dport 53 -j FLOTILLA_DNS"], "OUTPUT -p tcp -j FLOTILLA_OUTPUT");
    ordered(
        &t,
        &[
            "FLOTILLA_DNS -m owner --uid-owner 1337 -j RETURN",
            "FLOTILLA_DNS -m owner --uid-owner 7 -j RETURN",
        ],
        "FLOTILLA_DNS -p udp -j REDIRECT --to-ports 15053",
    );
    let t = nftables(&["--dns-port", "15053", "-m", "TPROXY"]);
    ordered(&t, &["udp dport 53 jump FLOTILLA_DNS"], "meta l4proto tcp jump FLOTILLA_OUTPUT");
    assert!(t.contains("meta l4proto udp redirect to :15053"), "{t}");
    assert_eq!(t.matches("redirect to :15053").count(), 2, "{t}");
}

#[test]
fn only_what_is_included() {
    let t = v4(&["-i", "10.0.0.0/8", "-b", "80,443", "-q", "9999"]);
    assert!(t.contains("FLOTILLA_CAPTURE -p tcp -d 10.0.0.0/8 -j REDIRECT --to-ports 15001"), "{t}");
    assert!(t.contains("FLOTILLA_CAPTURE -p tcp --dport 9999 -j REDIRECT --to-ports 15001"), "{t}");
    assert!(!t.contains("FLOTILLA_CAPTURE -p tcp -j REDIRECT"), "{t}");
    assert!(t.contains("FLOTILLA_INBOUND -p tcp --dport 443 -j REDIRECT --to-ports 15006"), "{t}");
    assert!(!t.contains("FLOTILLA_INBOUND -p tcp -j REDIRECT"), "{t}");
    assert!(!v4(&["-b", ""]).contains("PREROUTING"));
    // By user and group.
    let t = v4(&["--include-uids", "1000", "--include-gids", "2000", "--exclude-gids", "3000"]);
    assert!(t.contains("FLOTILLA_OUTPUT -m owner --uid-owner 1000 -j FLOTILLA_CAPTURE"), "{t}");
    assert!(t.contains("FLOTILLA_OUTPUT -m owner --gid-owner 2000 -j FLOTILLA_CAPTURE"), "{t}");
    assert!(!t.contains("FLOTILLA_OUTPUT -j FLOTILLA_CAPTURE"), "{t}");
    ordered(&t, &["--gid-owner 3000 -j RETURN"], "--uid-owner 1000 -j FLOTILLA_CAPTURE");
}

#[test]
fn tproxy_marks_what_goes_out_and_takes_first_packets() {
    let t = v4(&["-m", "tproxy", "-d", "22"]);
    assert!(t.starts_with("*mangle\n") && !t.contains("REDIRECT"), "{t}");
    ordered(
        &t,
        &["FLOTILLA_CAPTURE -p tcp -j CONNMARK --set-mark 1338"],
        "FLOTILLA_CAPTURE -p tcp -j MARK --set-mark 1338",
    );
    // Later packets go where the first one went, whoever sends them, before anybody's user is asked.
    ordered(
        &t,
        &[
            "FLOTILLA_OUTPUT -m connmark --mark 1338 -m conntrack --ctdir ORIGINAL -j MARK --set-mark 1338",
            "FLOTILLA_OUTPUT -p tcp ! --syn -j RETURN",
        ],
        "-m owner --uid-owner 1337 -j MARK --set-mark 1337",
    );
    ordered(
        &t,
        &[
            "FLOTILLA_INBOUND -p tcp --syn -i lo -m mark --mark 1338 -j TPROXY --on-port 15001 --tproxy-mark 1338",
            "FLOTILLA_INBOUND -p tcp --syn -i lo -m mark --mark 1337 -j TPROXY --on-port 15006 --tproxy-mark 1337",
            "FLOTILLA_INBOUND -i lo -j RETURN",
            "--dport 22 -j RETURN",
        ],
        "FLOTILLA_INBOUND -p tcp --syn -j TPROXY --on-port 15006 --tproxy-mark 1337",
    );
    assert!(
        t.contains(
            "FLOTILLA_OUTPUT -p tcp -o lo ! -d 127.0.0.1/32 -m owner --uid-owner 1337 -j MARK --set-mark 1337"
        ),
        "{t}"
    );
    // Nothing from outside, but what goes out still comes in by the loopback interface.
    let t = v4(&["-m", "TPROXY", "-b", ""]);
    assert!(t.contains("TPROXY --on-port 15001") && !t.contains("FLOTILLA_INBOUND -p tcp --syn -j"), "{t}");
    let t = nftables(&["-m", "TPROXY"]);
    assert!(
        t.contains("chain mangle_output {\n    type route hook output priority -150; policy accept;"),
        "{t}"
    );
    assert!(t.contains("tcp flags & (fin | syn | rst | ack) == syn iifname \"lo\" meta mark 1338 meta mark set 1338 tproxy to :15001 accept"), "{t}");
    assert!(t.contains("ct mark 1338 ct direction original meta mark set 1338 accept"), "{t}");
    assert!(t.contains("meta l4proto tcp ct mark set 1338 meta mark set 1338 accept"), "{t}");
    let r = route::describe(Family::V4, true) + &route::describe(Family::V6, true);
    assert!(r.contains("ip -4 rule add fwmark 1338 lookup 133\n"), "{r}");
    assert!(r.contains("ip -6 route add local ::/0 dev lo table 133\n"), "{r}");
    assert_eq!(route::describe(Family::V4, false), "");
}

#[test]
fn udp_to_ranges_is_marked_and_dns_stays_as_it_was() {
    let flags =
        ["-m", "TPROXY", "--udp-ranges", "10.96.0.0/12,fd00:96::/64", "--dns-port", "15053", "-o", "123"];
    let t = v4(&flags);
    ordered(
        &t,
        &[
            "FLOTILLA_UDP -m owner --uid-owner 1337 -j RETURN",
            "FLOTILLA_UDP -d 127.0.0.1/32 -j RETURN",
            "FLOTILLA_UDP -p udp --dport 53 -j RETURN",
            "FLOTILLA_UDP -p udp --dport 123 -j RETURN",
        ],
        "FLOTILLA_UDP -p udp -d 10.96.0.0/12 -j MARK --set-mark 1338",
    );
    let taken =
        "-A FLOTILLA_UDP_IN -p udp -i lo -m mark --mark 1338 -j TPROXY --on-port 15001 --tproxy-mark 1338";
    assert!(t.contains(taken), "{t}");
    assert!(!t.contains("fd00") && v6(&flags).contains("FLOTILLA_UDP -p udp -d fd00:96::/64 -j MARK"), "{t}");
    // What is about DNS is the same as without.
    let dns =
        |t: &str| t.lines().filter(|l| l.contains("FLOTILLA_DNS")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(dns(&t), dns(&v4(&["-m", "TPROXY", "--dns-port", "15053", "-o", "123"])));
    let t = nftables(&flags);
    ordered(
        &t,
        &["meta skuid 1337 return", "udp dport 53 return", "udp dport 123 return"],
        "meta l4proto udp ip daddr 10.96.0.0/12 meta mark set 1338 accept",
    );
    assert!(
        t.contains(
            "meta l4proto udp iifname \"lo\" meta mark 1338 meta mark set 1338 tproxy to :15001 accept"
        ),
        "{t}"
    );
    // By user; without a resolver of the mesh port 53 is a port like any other.
    let t = v4(&["-m", "TPROXY", "--udp-ranges", "*", "--include-uids", "1000"]);
    assert!(t.contains("FLOTILLA_UDP -p udp -m owner --uid-owner 1000 -j MARK --set-mark 1338"), "{t}");
    assert!(!t.contains("--dport 53"), "{t}");
    assert!(!v4(&["-m", "TPROXY"]).contains("udp"), "nothing unless asked for");
}

#[test]
fn bad_flags_name_themselves() {
    let error = |flags: &[&str]| plan(flags).unwrap_err().to_string();
    assert!(error(&["-b", "http"]).contains("--inbound-ports"));
    assert!(error(&["-i", "10.0.0.0/99"]).contains("--outbound-ranges"));
    assert!(error(&["--mode", "NONE"]).contains("--mode"));
    assert!(error(&["--udp-ranges", "*"]).contains("--mode TPROXY"));
    assert!(error(&["--mode", "TPROXY", "--udp-ranges", "x"]).contains("--udp-ranges"));
}
