// Package deploy holds the files of a node that the program itself can write there.
package deploy

import _ "embed" // for Unit

// Unit is the systemd unit, as the packages install it.
//
//go:embed systemd/streamshim.service
var Unit string
