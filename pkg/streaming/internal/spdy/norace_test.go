//go:build !race

package spdy

const raceEnabled = false
