package websocket

import (
	"encoding/binary"
	"fmt"
	"net/http"
)

// MaxPorts bounds the ports of one legacy port-forward connection.
const MaxPorts = maxChannels / 2

// PortChannels are the two channels of a port.
type PortChannels struct {
	Port  uint16
	Data  *Channel
	Error *Channel // for us to write to
}

// AcceptPortForward is like Accept, for a legacy port-forward over channels (v4, base64 or unnamed) to these ports, at most
// MaxPorts. Port number i has the channels 2i for data and 2i+1 for errors. There is one connection per port. Only all
// ports together can be half-closed: see ChannelConn.CloseWrite for our side, and ChannelConn.Serve for the client's.
//
// It sends the first message of each channel, which is the port as 16 bits little-endian, and returns the channels in the
// order of the ports. config.Channels and config.Greeting are not used. If it returns an error, it has answered the
// request.
func AcceptPortForward(w http.ResponseWriter, r *http.Request, protocol Protocol, ports []uint16, config Config) (*ChannelConn, []PortChannels, error) {
	if len(ports) == 0 || len(ports) > MaxPorts {
		reason := fmt.Sprintf("a port-forward without SPDY needs 1 to %d ports in its request, not %d", MaxPorts, len(ports))
		http.Error(w, reason, http.StatusBadRequest)
		return nil, nil, &HandshakeError{StatusCode: http.StatusBadRequest, Reason: reason}
	}
	config.Greeting = false
	config.Channels = nil
	for range ports {
		config.Channels = append(config.Channels, ReadWrite, Write)
	}
	c, err := Accept(w, r, protocol, config)
	if err != nil {
		return nil, nil, err
	}
	channels := make([]PortChannels, 0, len(ports))
	for i, port := range ports {
		pair := PortChannels{Port: port, Data: c.Channel(byte(2 * i)), Error: c.Channel(byte(2*i + 1))}
		channels = append(channels, pair)
		announcement := binary.LittleEndian.AppendUint16(nil, port)
		for _, channel := range []*Channel{pair.Data, pair.Error} {
			if _, err := channel.Write(announcement); err != nil {
				c.CloseNow()
				return nil, nil, fmt.Errorf("announce port %d: %w", port, err)
			}
		}
	}
	return c, channels, nil
}
