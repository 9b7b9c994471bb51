package cri

import (
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Methods returns the full names of all methods of the vendored CRI, such as "/runtime.v1.RuntimeService/Exec".
// Methods of a newer CRI are forwarded too.
func Methods() []string {
	var names []string
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range service.Methods {
			names = append(names, "/"+service.ServiceName+"/"+m.MethodName)
		}
		for _, m := range service.Streams {
			names = append(names, "/"+service.ServiceName+"/"+m.StreamName)
		}
	}
	return names
}

// unaryMethods are the Methods with one request and one response.
var unaryMethods = func() map[string]bool {
	names := map[string]bool{}
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range service.Methods {
			names["/"+service.ServiceName+"/"+m.MethodName] = true
		}
	}
	return names
}()

// streamDescs describes the Methods that are streams.
var streamDescs = func() map[string]*grpc.StreamDesc {
	descs := map[string]*grpc.StreamDesc{}
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range service.Streams {
			descs["/"+service.ServiceName+"/"+m.StreamName] = &grpc.StreamDesc{ClientStreams: m.ClientStreams, ServerStreams: m.ServerStreams}
		}
	}
	return descs
}()
