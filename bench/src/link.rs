//! A link with a delay: what is sent arrives later, as much of it as was sent.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Forwards connections to `server`, each way `delay` later; answers where it listens. It lives as long as the process.
///
/// Threads of the system, for a runtime's timer counts whole milliseconds. Any amount is under way at once, so that the
/// delay limits no throughput.
pub(crate) fn delayed(server: SocketAddr, delay: Duration) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // A link that cannot be made is one that is closed at once.
            let _refused = forward(&client, server, delay);
        }
    });
    Ok(address)
}

fn forward(client: &TcpStream, server: SocketAddr, delay: Duration) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    one_way(client.try_clone()?, server.try_clone()?, delay);
    one_way(server, client.try_clone()?, delay);
    Ok(())
}

fn one_way(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now() + delay, buffer[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // The other side is told of the end; where it is gone, there is nobody to tell.
        let _gone = to.shutdown(std::net::Shutdown::Write);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_whole_and_so_does_the_end() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = delayed(server.local_addr().unwrap(), Duration::from_millis(1)).unwrap();
        let echo = thread::spawn(move || {
            let (mut client, _) = server.accept().unwrap();
            let mut received = Vec::new();
            client.read_to_end(&mut received).unwrap();
            client.write_all(&received).unwrap();
        });
        let mut client = TcpStream::connect(address).unwrap();
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(300_000).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert!(received == sent);
        echo.join().unwrap();
    }
}
