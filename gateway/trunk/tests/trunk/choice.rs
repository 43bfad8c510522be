//! What carries new sessions, and which congestion control, by peer and by measurement.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_trunk::{Carrier, LinkStatus, Path, Trunk, TrunkMetrics, TrunkOptions};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

use crate::support::{echo, gateway, greeted, id, options, ping, root};

fn quic(trunk: &Trunk) -> LinkStatus {
    trunk.links().into_iter().find(|l| l.transport == Carrier::Quic).unwrap()
}

fn tcp(trunk: &Trunk) -> Option<LinkStatus> {
    trunk.links().into_iter().find(|l| l.transport == Carrier::Tcp)
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_clean_path_gets_tcp_for_as_long_as_that_gets_through() {
    let root = root();
    let deliver = echo().await;
    // TCP at the address of the trunk, which says that it was TCP.
    let front = TcpListener::bind(any()).await.unwrap();
    let at = front.local_addr().unwrap();
    let front = tokio::spawn(async move {
        let mut open = vec![];
        loop {
            let (s, _) = front.accept().await.unwrap();
            s.try_write(b"by TCP").unwrap();
            open.push(s);
        }
    });
    let east = gateway(&root, &root, "east");
    let _east = Trunk::start(options(at, deliver), &east, TrunkMetrics::default()).unwrap();
    let west = TrunkOptions { transport: "quic,east=auto".parse().unwrap(), ..options(any(), deliver) };
    let west = Trunk::start(west, &gateway(&root, &root, "west"), TrunkMetrics::default()).unwrap();

    let mut first = west.dial(at, Some(&id("east"))).await.unwrap();
    greeted(&mut first).await;
    assert_eq!((west.path(at), tcp(&west)), (Path::Quic, None));
    let begun = Instant::now();
    while west.path(at) != Path::Tcp {
        assert!(begun.elapsed() < Duration::from_secs(90), "{:?}", quic(&west));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let link = quic(&west);
    assert_eq!(link.new_sessions, Some(Carrier::Tcp), "{link:?}");
    assert!(link.choice.as_ref().unwrap().starts_with("short and clean ("), "{link:?}");
    let mut second = west.dial(at, Some(&id("east"))).await.unwrap();
    let mut said = [0; 6];
    second.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"by TCP");
    let chosen = tcp(&west).unwrap();
    assert!(chosen.chosen && chosen.sessions == 1, "{chosen:?}");
    // What is open stays where it is.
    ping(&mut first).await.unwrap();

    // A port that is closed costs no session.
    front.abort();
    let _ = front.await;
    let mut third = west.dial(at, Some(&id("east"))).await.unwrap();
    greeted(&mut third).await;
    let link = quic(&west);
    assert_eq!((link.new_sessions, west.path(at)), (Some(Carrier::Quic), Path::Quic), "{link:?}");
    drop(second);
    assert_eq!(tcp(&west), None, "nothing is left of TCP");
}

#[tokio::test]
async fn settings_hold_for_the_peer_that_they_name() {
    let root = root();
    let deliver = echo().await;
    let start = |o, name| Trunk::start(o, &gateway(&root, &root, name), TrunkMetrics::default()).unwrap();
    let east = TrunkOptions { congestion: "bbr,west=cubic".parse().unwrap(), ..options(deliver, deliver) };
    let east = start(east, "east");
    let west = TrunkOptions {
        transport: "tcp,east=quic".parse().unwrap(),
        congestion: "cubic,east=bbr".parse().unwrap(),
        ..options(any(), deliver)
    };
    let west = start(west, "west");
    // The address is known to be of east by what is expected there.
    let mut s = west.dial(deliver, Some(&id("east"))).await.unwrap();
    greeted(&mut s).await;
    let (ours, theirs) = (quic(&west), quic(&east));
    assert_eq!((ours.congestion.as_deref(), theirs.congestion.as_deref()), (Some("bbr"), Some("cubic")));
    assert_eq!(ours.choice.as_deref(), Some("set by --trunk-transport"));
    assert_eq!(theirs.choice.as_deref(), Some("the peer dialled"));
    assert_eq!(tcp(&west), None);

    let mut s = west.dial(deliver, None).await.unwrap();
    s.read_exact(&mut [0; 6]).await.unwrap();
    let set = tcp(&west).unwrap();
    assert!(set.chosen && set.why_tcp.as_deref() == Some("set by --trunk-transport"), "{set:?}");
}
