package streaming

func (p *plainConnections) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.elements)
}
